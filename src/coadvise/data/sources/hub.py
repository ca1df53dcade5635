"""Finds and opens datasets of Hugging Face; `sources/dataset.py` reads them.

They are on the hub, saved to disk, or Parquet and Arrow files that hold the images themselves. A Parquet table of paths
is none of these; `sources/table.py` reads it.
"""

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from coadvise.config.schema import DataConfig
from coadvise.data.sources.folder import with_images
from coadvise.data.sources.split import TRAIN, kind_of_split
from coadvise.data.sources.table import IMAGE_COLUMNS, plain, root_of
from coadvise.errors import UserError

PREFIX = "hf:"
_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}  # file endings, and what `datasets` calls them
_SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # what `save_to_disk` writes


@dataclass(frozen=True)
class Found:
    """A dataset that is not open yet.

    Attributes:
        where: what the user calls it.
        root: the folder that paths of images without bytes are relative to.
        load: opens it.
    """

    where: str
    root: Path
    load: Callable[[], Mapping[str, Any]]

    def open(self) -> dict[str, Any]:
        """A `datasets.Dataset` for each split. Raises UserError: the package is missing, or it cannot be opened."""
        with _explained(self.where):
            loaded = {name: dataset.with_format(None) for name, dataset in self.load().items()}
        if not any(map(len, loaded.values())):
            raise UserError(f"dataset '{self.where}' has no rows; give one of labelled images")
        return loaded


def dataset_in(data: str | Path, how: DataConfig) -> Found | None:
    """The dataset that `data` names, is, or holds. Looks at nothing but names and one schema."""
    where, path = str(data), Path(data)
    if where.startswith(PREFIX):
        return Found(where, root_of(how, Path()), partial(_load_named, where))
    base = path if path.is_dir() else path.parent
    if any(all((path / name).is_file() for name in names) for names in _SAVED):
        return Found(where, root_of(how, base), partial(_load_saved, path))
    if (files := _files(path)) and _holds_images(files[0], how):
        return Found(where, root_of(how, base), partial(_load_files, path, files, how))
    return None


def short_name(name: str) -> str:
    """`hf:ORG/NAME:CONFIG` as NAME-CONFIG."""
    return name.removeprefix(PREFIX).rpartition("/")[2].replace(":", "-")


def _holds_images(file: Path, how: DataConfig) -> bool:
    """Whether a file holds images themselves, not their paths."""
    if file.suffix.lower() == ".arrow":
        return True
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:  # `table.py` says so
        return False
    try:
        schema = parquet.read_schema(file)
    except (OSError, ArrowException):  # as above
        return False

    def holds(field: Any) -> bool:
        if types.is_struct(field.type):
            return "bytes" in [inner.name for inner in field.type]
        binary = types.is_binary(field.type) or types.is_large_binary(field.type)
        return binary and bool(how.image_column or plain(field.name) in IMAGE_COLUMNS)

    return any(holds(field) for field in schema if field.name == how.image_column or not how.image_column)


def _files(data: Path) -> list[Path]:
    """A file of rows, or those of a folder: there, in data/, or in folders that are called as splits usually are."""
    if data.is_file():
        return [data] if data.suffix.lower() in _FORMATS else []
    splits = [path for path in _listed(data) if kind_of_split(path.name)]
    for folders in ([data], [data / "data"], splits):
        there = [path for folder in folders for path in _listed(folder)]
        for ending in _FORMATS:
            # Files called cache-... are what `datasets` keeps of work on others.
            found = [p for p in there if p.suffix.lower() == ending and not p.name.startswith((".", "cache-"))]
            if found:
                return [] if len(with_images(data)) > 1 else found  # class folders, whatever lies beside them
    return []


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # no folder, or one that `folder.py` explains
        return []


def _split_of(file: Path, data: Path) -> str:
    """The split of a file by its name, as `train` of train-00000-of-00002.parquet, or of its folder."""
    stem = re.sub(r"-\d+-of-\d+$", "", file.stem)
    folder = [file.parent.name] if file.parent != data else []
    return next((word for word in (stem, *re.split(r"[-_.]", stem), *folder) if kind_of_split(word)), stem)


def _load_files(data: Path, files: Sequence[Path], how: DataConfig) -> dict[str, Any]:
    from datasets import load_dataset

    names = [_split_of(file, data) for file in files]
    if not how.splits and not any(map(kind_of_split, names)):
        names = [TRAIN] * len(files)  # parts of one set
    return {
        name: load_dataset(
            _FORMATS[files[0].suffix.lower()],
            data_files={
                TRAIN: [glob.escape(str(f.absolute())) for f, own in zip(files, names, strict=True) if own == name]
            },
            split=TRAIN,
        )
        for name in dict.fromkeys(names)
    }


def _load_saved(folder: Path) -> dict[str, Any]:
    from datasets import Dataset, load_from_disk

    found = load_from_disk(str(folder))
    return {TRAIN: found} if isinstance(found, Dataset) else dict(found)


@cache  # a command sees one revision, and asks the hub once
def _load_named(where: str) -> dict[str, Any]:
    from datasets import load_dataset

    name, _, configuration = where.removeprefix(PREFIX).partition(":")
    if not name:
        raise UserError(
            f"'{where}' names no dataset; give {PREFIX}NAME, {PREFIX}ORG/NAME or {PREFIX}NAME:CONFIGURATION"
        )
    return dict(load_dataset(name, configuration or None))


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        if error.name != "datasets":
            raise
        raise UserError(
            f"'{where}' is a dataset of Hugging Face, read by the package datasets: pip install 'coadvise[datasets]'"
        ) from None
    except Exception as error:  # of many kinds, from several packages
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"dataset '{where}' cannot be opened: {reason}; {_advice(where, error)}") from None


def _advice(where: str, error: Exception) -> str:
    if not where.startswith(PREFIX):
        return "write it again, by save_to_disk or to_parquet"
    if isinstance(error, ConnectionError):
        return "connect to the network once, after that it is read from the cache; or give a saved folder"
    if type(error).__name__ == "DatasetNotFoundError":
        return "check its name; one with terms to accept needs that done on its page, and 'hf auth login'"
    if isinstance(error, ValueError) and "onfig" in str(error):
        return f"give one as {PREFIX}NAME:CONFIGURATION"
    return "save it with save_to_disk where it can be loaded, and give that folder"
