"""Where labelled pictures come from: a folder, a table, a dataset of Hugging Face, shards, or a named source.

To add a source, write a module with a `Split` of its own and a function that returns a `Source`, and list it in `NAMED`
or choose it in `open_source`. Nothing outside this package knows where the bytes of a picture are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coadvise.config.schema import DataConfig, RunConfig
from coadvise.data.sources import dataset, digits, folder, hub, shards, table
from coadvise.data.sources.split import (
    Source,
    Split,
    chosen_classes,
    classes_of,
    few,
    few_a_class,
    known_classes,
    relabelled,
    used_classes,
)
from coadvise.errors import UserError

__all__ = [
    "NAMED", "Source", "Split", "evaluation_remarks", "evaluation_split", "few", "is_here", "open_source", "resolved",
    "short_name", "source_of", "typical_size",
]  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A source that is given by its name in place of a folder, and the preset made for it."""

    open: Callable[[], Source]
    preset: str


NAMED = {"digits": Named(digits.open_digits, "digits")}


def source_of(config: RunConfig) -> Source:
    """The pictures of a run, as `open_source` finds them."""
    return open_source(config.data.source, config.data, config.seed)


def open_source(data: str | Path, how: DataConfig | None = None, seed: int = 0) -> Source:
    """Finds the classes and all splits.

    Args:
        data: a name in `NAMED`; a folder with train/ and one of val/, test/ or another usual name; a folder of class
            folders; a table, or a folder with metadata.csv or with train.txt and val.txt; hf:NAME, or a dataset of
            Hugging Face in a folder or file; shards:URL.
        how: which classes and splits, and where they are.
        seed: decides which pictures are held out where the data have no splits.

    Raises:
        UserError: no such folder, no pictures, one class, a class without an image to train on, chosen classes that do
            not exist.
    """
    how = how or DataConfig()
    if (named := NAMED.get(str(data))) is not None:
        _refuse_useless(data, how, "is a set of its own", ("splits", "depth", *_OF_COLUMNS))
        source = named.open()
        if how.classes or how.exclude:
            used = chosen_classes(source.where, source.classes, how.classes, how.exclude)
            kept, own = classes_of(used), [used.get(name) for name in source.classes]
            train, val = (relabelled(split, own, kept) for split in (source.train, source.val))
            source = replace(source, classes=kept, train=train, val=val)
    elif _in_shards(data):
        _refuse_useless(data, how, "has its splits and classes already", ("splits", "depth", *_OF_COLUMNS))
        source = shards.open_shards(str(data), how)
    elif (stored := hub.dataset_in(data, how)) is not None:
        _refuse_useless(data, how, "is a dataset", ("depth",))
        source = dataset.open_dataset(stored, how, seed)
    elif (found := table.table_in(Path(data))) is not None:
        _refuse_useless(data, how, "is a table", ("depth",))
        source = table.open_table(found, how, seed)
    else:
        root = _existing(data)
        _refuse_useless(data, how, "is a folder of class folders", _OF_COLUMNS)
        unused = _unused_tables(root)
        try:
            source = folder.open_folder(root, how, seed)
        except UserError as error:
            said = str(error)
            raise UserError("; ".join([said, *(line for line in unused if " table" not in said)])) from None
        source = replace(source, remarks=(*source.remarks, *unused))
    if how.classes:
        source = replace(source, note=f"{source.note}; {len(how.classes)} chosen classes")
    if how.per_class is not None:
        rows = few_a_class(source.train.labels, how.per_class, seed)
        note = f"{source.note}; at most {how.per_class} training images a class"
        source = replace(source, train=source.train.subset(rows), note=note)
    return source


def evaluation_split(data: str | Path, classes: Sequence[str], how: DataConfig | None = None) -> Split:
    """The pictures to score a finished network on: the test or validation split, or all where there are no splits.

    Args:
        classes: those that the network knows, in its order; labels are indices into it.
        how: which classes of `data`, of which some may be missing, and where they are.

    Raises:
        UserError: no such folder, a class that the network does not know, or no picture of its classes.
    """
    how = how or DataConfig()
    if (named := NAMED.get(str(data))) is not None:
        source = named.open()
        used = used_classes(source.classes, how.classes, how.exclude)
        known_classes(source.where, used, classes)
        return relabelled(source.val, [used.get(name) for name in source.classes], classes)
    if _in_shards(data):
        return shards.evaluation_split(str(data), classes, how)
    if (stored := hub.dataset_in(data, how)) is not None:
        return dataset.evaluation_split(stored, classes, how)
    if (found := table.table_in(Path(data))) is not None:
        return table.evaluation_split(found, classes, how)
    return folder.evaluation_split(_existing(data), classes, how)


def evaluation_remarks(data: str | Path, how: DataConfig | None = None) -> tuple[str, ...]:
    """What `evaluation_split` leaves out of `data`, in lines for the user."""
    how = how or DataConfig()
    if str(data) in NAMED or _in_shards(data):
        return ()
    if (stored := hub.dataset_in(data, how)) is not None:
        return dataset.evaluation_remarks(stored, how)
    if (found := table.table_in(Path(data))) is not None:
        return table.read_table(found, how).remarks
    return (*folder.evaluation_remarks(Path(data), how), *_unused_tables(Path(data)))


def typical_size(data: str | Path, how: DataConfig | None = None) -> int:
    """The median shorter side, in pixels, of the first pictures below a folder; 0 where there are none.

    Args:
        how: where a table's pictures are, and which column of a dataset holds them.
    """
    how = how or DataConfig()
    if _in_shards(data):
        return shards.typical_size(str(data))
    if (stored := hub.dataset_in(data, how)) is not None:
        return dataset.typical_size(stored, how)
    found = table.table_in(Path(data))
    return folder.typical_size(Path(data) if found is None else table.root_of(how, found.path.parent))


def short_name(data: str | Path) -> str:
    """What to call data in a file name: the name of their folder, or of the table without its ending."""
    if str(data).startswith(hub.PREFIX):
        return hub.short_name(str(data))
    if _in_shards(data):
        return shards.short_name(str(data))
    path = Path(data).resolve()
    return path.stem if path.is_file() else path.name


def resolved(data: str | Path) -> str:
    """`data` as it can be given from any directory: an absolute path, or a name."""
    if _in_shards(data):
        return shards.resolved(str(data))
    return str(data) if str(data) in NAMED or str(data).startswith(hub.PREFIX) else str(Path(data).resolve())


def _in_shards(data: str | Path) -> bool:
    return str(data).startswith(shards.PREFIX)


def is_here(data: str) -> bool:
    """Whether data, as `resolved` has them, are on this machine's disks."""
    return Path(data.removeprefix(shards.PREFIX)).exists()


_OF_COLUMNS = ("image_column", "label_column", "split_column", "root")


def _refuse_useless(data: str | Path, how: DataConfig, what: str, keys: Sequence[str]) -> None:
    """Raises UserError for keys that would change nothing."""
    if given := [key for key in keys if getattr(how, key)]:
        key = given[0]
        raise UserError(f"data.{key}={getattr(how, key)} has no use, since '{data}' {what}; leave it out")


def _unused_tables(root: Path) -> list[str]:
    """A line about tables that lie beside class folders, if any do."""
    tables = sorted(path.name for path in root.iterdir() if path.suffix.lower() in folder.TABLE_ENDINGS)
    return [f"not used: {len(tables)} table(s) there; to use one give '{root / tables[0]}'"] if tables else []


def _existing(data: str | Path) -> Path:
    if not (root := Path(data)).is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(
            f"data folder '{data}' {what}; give a folder of class folders, one with train/ and val/, a table "
            f"({', '.join(folder.TABLE_ENDINGS)}), hf:NAME, shards:URL, or {' or '.join(map(repr, NAMED))}"
        )
    return root
