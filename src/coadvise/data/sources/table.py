"""Tables of paths and labels: CSV, TSV, JSON Lines, Parquet, and lists of `path, label`."""

import csv
import json
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from coadvise.config.reading import nearest
from coadvise.config.schema import DataConfig
from coadvise.data.sources.folder import TABLE_ENDINGS, FolderSplit, image_paths, with_images
from coadvise.data.sources.split import (
    TEST,
    TRAIN,
    VAL,
    Source,
    Split,
    chosen_classes,
    classes_of,
    divided,
    few,
    known_classes,
    named_splits,
    split_note,
    used_classes,
    with_splits,
)
from coadvise.errors import UserError

# By what columns are usually called, in this order; compared in lower case without spaces, "-" and "_".
IMAGE_COLUMNS = (
    "image",
    "filename",
    "file",
    "path",
    "imagepath",
    "filepath",
    "imagefile",
    "imageid",
    "imagename",
    "id",
    "name",
)
LABEL_COLUMNS = (
    "label",
    "class",
    "category",
    "target",
    "labels",
    "classname",
    "labelname",
    "species",
    "diagnosis",
    "kind",
    "y",
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition")


@dataclass(frozen=True)
class Table:
    """A table, or the lists of several splits.

    Attributes:
        path: the file, or the folder of the lists.
        lists: a list of `path, label` for each split; empty for a table.
    """

    path: Path
    lists: Mapping[str, Path]


@dataclass(frozen=True)
class Rows:
    """What a table says of the images that exist.

    Attributes:
        root: the folder that `files` are relative to.
        files, labels, splits: one each a row; splits are None without a split column.
        all_labels: sorted, those of `data.exclude` and of rows without an image among them.
        remarks: what was left out, a line each.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[str, ...]
    splits: tuple[str, ...] | None
    all_labels: tuple[str, ...]
    remarks: tuple[str, ...]


def table_in(data: Path) -> Table | None:
    """The table that `data` is, or a folder holds: metadata.csv, or train.txt and val.txt without class folders."""
    if data.is_file() and data.suffix.lower() in TABLE_ENDINGS:
        return Table(data, {})
    if not data.is_dir():
        return None
    for ending in TABLE_ENDINGS:
        if (path := data / f"metadata{ending}").is_file():
            return Table(path, {})
    if len(with_images(data)) > 1:  # class folders, whatever lists lie beside them
        return None
    texts = {path.stem: path for path in sorted(data.glob("*.txt"))}
    splits = named_splits(data, list(texts), {}) if len(texts) > 1 else {}
    if TRAIN in splits and len(splits) > 1 and not any((data / name).is_dir() for name in splits.values()):
        return Table(data, {kind: texts[name] for kind, name in splits.items()})
    return None


def open_table(table: Table, how: DataConfig, seed: int) -> Source:
    """The source of a table, as `sources.open_source`. Raises UserError for what `read_table` refuses."""
    rows = read_table(table, how)
    splits = {} if rows.splits is None else _splits(table, rows.splits, how)
    if how.splits and (table.lists or rows.splits is None):
        raise UserError(
            f"'{table.path}' has no column of splits, so data.splits has no use; name one with data.split_column, or "
            "leave it out"
        )
    chosen_classes(table.path, rows.all_labels, how.classes, how.exclude)  # refuses those that do not exist
    of_split = {
        kind: [row for row, name in enumerate(rows.splits or ()) if name == splits[kind]]
        for kind in (TRAIN, VAL, TEST)
        if kind in splits
    }
    chosen = [row for part in of_split.values() for row in part] if splits else range(len(rows.files))
    used = used_classes(sorted({rows.labels[row] for row in chosen}), how.classes)
    classes = classes_of(used)
    if len(classes) < 2:
        raise UserError(
            f"'{table.path}' has one label that is used, {few(classes)}; at least two are needed; see data.exclude, or "
            "name another column with data.label_column"
        )
    if not splits:
        everything = _split(rows, chosen, used, classes)
        return divided(table.path, classes, everything, how.val_fraction, seed, rows.remarks, "table")
    parts = {kind: _split(rows, part, used, classes) for kind, part in of_split.items()}
    return with_splits(table.path, classes, parts, split_note(splits), rows.remarks)


def evaluation_split(table: Table, classes: Sequence[str], how: DataConfig) -> Split:
    """As `sources.evaluation_split`."""
    rows = read_table(table, how)
    chosen: Sequence[int] = range(len(rows.files))
    if rows.splits is not None:
        splits = _splits(table, rows.splits, how, to_train=False)
        scored = splits.get(TEST) or splits[VAL]
        chosen = [row for row, name in enumerate(rows.splits) if name == scored]
    used = used_classes(sorted({rows.labels[row] for row in chosen}), how.classes)
    known_classes(table.path, used, classes)
    split = _split(rows, chosen, used, classes)
    if not len(split):
        raise UserError(f"'{table.path}' holds no images of the student's classes ({few(classes)})")
    return split


def read_table(table: Table, how: DataConfig) -> Rows:
    """Reads a table and finds its images.

    Raises:
        UserError: it cannot be read, lacks a column, has rows without a label, or no row's image exists.
    """
    if table.lists:
        found = [(kind, *line) for kind, path in table.lists.items() for line in _list_lines(path)]
        splits, paths, labels = ([*column] for column in zip(*found, strict=True)) if found else ([], [], [])
        base, has_splits = table.path, True
    else:
        records = _records(table.path)
        columns = list(dict.fromkeys(name for record in records for name in record))  # JSON may leave some out
        if not records:
            raise UserError(f"'{table.path}' has no rows; give one for each image, such as image,label in CSV")
        image = column_named(table.path, columns, how.image_column, "image", IMAGE_COLUMNS)
        label = column_named(table.path, columns, how.label_column, "label", LABEL_COLUMNS)
        split = column_named(table.path, columns, how.split_column, "split", SPLIT_COLUMNS, needed=False)
        paths, labels = (
            [text_of(record.get(image)) for record in records],
            [text_of(record.get(label)) for record in records],
        )
        splits = [text_of(record.get(split)) for record in records] if split else []
        base, has_splits = table.path.parent, bool(split)
        if odd := next((record[label] for record in records if isinstance(record.get(label), list | dict)), None):
            raise UserError(
                f"'{table.path}': its column '{label}' has {odd!r}, and an image needs one label, a text or a number; "
                "name another column with data.label_column"
            )
    root = root_of(how, base)
    rows = [row for row, label in enumerate(labels) if label not in how.exclude]
    if missing := [row for row in rows if not labels[row]]:
        raise UserError(
            f"'{table.path}': {len(missing)} row(s) have no label, the first is {paths[missing[0]]!r}; fill them in or "
            "leave them out with data.exclude=['']"
        )
    used = [(paths[row], labels[row], splits[row] if has_splits else "") for row in rows]
    return _found(table, root, used, has_splits, list(zip(paths, labels, strict=True)))


def root_of(how: DataConfig, base: Path) -> Path:
    """The folder that paths are relative to. Raises UserError for a `data.root` that is none."""
    root = Path(how.root) if how.root else base
    if not root.is_dir():
        raise UserError(f"data.root={how.root}: there is no such folder; give the folder that holds the images")
    return root


def _found(
    table: Table, root: Path, rows: Sequence[tuple[str, str, str]], has_splits: bool, every: Sequence[tuple[str, str]]
) -> Rows:
    """The rows whose images exist, each image once. `every` has path and label of all rows, also of those left out."""
    files = _Files(root)
    kept: dict[str, tuple[str, str]] = {}
    without, doubtful = list[str](), list[str]()
    for path, label, split in rows:
        file = files.find(path)
        if file is None:
            without.append(path)
        elif file in kept and kept[file] != (label, split):
            doubtful.append(file)
        else:
            kept[file] = label, split
    if not rows:
        raise UserError(f"'{table.path}' has no row with a label that is used; see data.exclude")
    if not kept:
        raise UserError(
            f"'{table.path}': none of its {len(rows)} images exists below '{root}', the first is '{rows[0][0]}'; give "
            "the folder that holds them as data.root"
        )
    for file in doubtful:
        kept.pop(file, None)
    lines = []
    if without:
        lines.append(f"left out, without a file: {len(without)} row(s), {few(without)}")
    if doubtful:
        lines.append(
            f"left out, since their rows disagree: {len(set(doubtful))} image(s), {few(sorted(set(doubtful)))}"
        )
    places = {file.rpartition("/")[0] for file in kept}
    listed = {file for path, _ in every if (file := files.find(path))}
    unlisted = [file for file in files.all if file.rpartition("/")[0] in places and file not in listed]
    if unlisted:
        lines.append(f"not in the table: {len(unlisted)} image(s), {few(unlisted)}")
    order = sorted(
        kept, key=lambda file: file.split("/")
    )  # not the table's: a folder's, so that both are the same data
    return Rows(
        root,
        tuple(order),
        tuple(kept[file][0] for file in order),
        tuple(kept[file][1] for file in order) if has_splits else None,
        tuple(sorted({label for _, label in every})),
        tuple(lines),
    )


class _Files:
    """Finds images by the paths of a table: as given, in any folder below the root, with or without their ending."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def all(self) -> list[str]:
        """All images below the root, relative to it."""
        return image_paths(self.root)

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """Images by their name, and by their name without its ending."""
        found: dict[str, list[str]] = defaultdict(list)
        for path in self.all:
            name = path.rpartition("/")[2]
            for key in {name, name.rpartition(".")[0] or name}:
                found[key].append(path)
        return found

    def find(self, given: str) -> str | None:
        """Raises UserError if several images could be meant."""
        path = given.strip().replace("\\", "/").removeprefix("./")
        if not path:
            return None
        if os.path.isabs(path):  # noqa: PTH117
            path = os.path.relpath(path, self.root)
        plain = posixpath.normpath(path)  # one picture may be listed under two spellings
        for spelling in (plain, path):  # they differ where a link is followed by ..
            if (self.root / spelling).is_file():
                return spelling
        name = path.rpartition("/")[2]
        folder = path.rpartition("/")[0]
        candidates = [
            p for p in self._by_end.get(name, ()) if not folder or f"/{p}".rpartition("/")[0].endswith(f"/{folder}")
        ]
        if len(candidates) > 1:
            raise UserError(
                f"'{given}' could be {few(candidates)}; give paths with their folders, or the folder as data.root"
            )
        return candidates[0] if candidates else None


def _split(rows: Rows, chosen: Sequence[int], used: Mapping[str, str], classes: Sequence[str]) -> Split:
    place = {name: number for number, name in enumerate(classes)}
    pairs = sorted((place[used[rows.labels[row]]], row) for row in chosen if rows.labels[row] in used)
    labels = np.array([label for label, _ in pairs], np.int64)
    return FolderSplit.of(rows.root, (rows.files[row] for _, row in pairs), labels)


def _splits(table: Table, values: Sequence[str], how: DataConfig, to_train: bool = True) -> dict[str, str]:
    if table.lists:
        return {kind: kind for kind in table.lists}
    return splits_of_column(table.path, Counter(values), how, to_train)


def splits_of_column(
    where: object, counts: Mapping[str, int], how: DataConfig, to_train: bool = True
) -> dict[str, str]:
    """Which value of a split column is which split.

    Args:
        counts: rows of each value.

    Raises:
        UserError: an unknown value, or no split to train on or to score on.
    """
    there = sorted(counts)
    splits = named_splits(where, there, how.splits)
    if not to_train and {VAL, TEST} & splits.keys():
        return splits
    unknown = [name for name in there if name not in splits.values()] if to_train and not how.splits else []
    if unknown:
        what = ", ".join(f"'{name}' in {counts[name]} row(s)" for name in unknown[:5])
    elif TRAIN not in splits and to_train:
        what = f"{few(there)}, so none to train on"
    elif len(splits) < 2:
        what = f"{few(there)}, so none to score on"
    else:
        return splits
    raise UserError(
        f"'{where}': its split column has {what}; usual are train, val and test; correct them, say which is which by "
        "data.splits={train: ..., val: ...}, or name another column with data.split_column"
    )


def plain(name: str) -> str:
    """A column's name as it is compared with the usual ones."""
    return re.sub(r"[\s_-]", "", name.lower())


def column_named(
    where: object, columns: Sequence[str], given: str, what: str, usual: Sequence[str], needed: bool = True
) -> str:
    """The name of a column; empty if there is none and none is needed."""
    if given:
        if given not in columns:
            raise UserError(
                f"'{where}' has no column '{given}'{nearest(given, columns)}; its columns are {', '.join(columns)}"
            )
        return given
    there = {plain(name): name for name in columns}
    for name in usual:
        if name in there:
            return there[name]
    if not needed:
        return ""
    raise UserError(
        f"'{where}' has no column that is usually the {what}'s ({', '.join(usual[:6])}, ...); its columns are "
        f"{', '.join(columns)}; name it with data.{what}_column"
    )


def _records(path: Path) -> list[Mapping[str, Any]]:
    readers: Mapping[str, Callable[[Path], list[Mapping[str, Any]]]] = {
        ".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines, ".parquet": _parquet,
    }  # fmt: skip
    try:
        return readers[path.suffix.lower()](path)
    except UnicodeDecodeError:
        raise UserError(f"table '{path}' cannot be read: it is not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"table '{path}' cannot be read: {' '.join(str(error).split())}") from None


def _delimited(path: Path) -> list[Mapping[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        counts = Counter({mark: first.count(mark) for mark in ",;\t|"})
        reader = csv.reader(file, delimiter=counts.most_common(1)[0][0], strict=True)
        try:
            columns = next(reader, [])
            if twice := [name for name, count in Counter(columns).items() if name and count > 1]:
                raise ValueError(f"it has {columns.count(twice[0])} columns '{twice[0]}'; rename one")
            return [dict(zip(columns, _fitting(row, columns), strict=True)) for row in reader if row]
        except (csv.Error, IndexError) as error:
            raise ValueError(f"line {reader.line_num}: {error}; check quotes and commas") from None


def _fitting(row: list[str], columns: Sequence[str]) -> list[str]:
    """A row with a value for each column; values may lack at its end. Raises IndexError for too many."""
    if any(map(str.strip, row[len(columns) :])):
        raise IndexError(f"{len(row)} values, and there are {len(columns)} columns")
    return [*row[: len(columns)], *[""] * (len(columns) - len(row))]


def _json_lines(path: Path) -> list[Mapping[str, Any]]:
    found = list[Mapping[str, Any]]()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}, at its character {error.pos + 1}") from None
        if not isinstance(record, dict):
            raise ValueError(f'line {number}: each line must be an object such as {{"image": ..., "label": ...}}')
        found += [record] if record else []
    return found


def _parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(
            f"'{path}': reading Parquet needs the package pyarrow; install it, or save the table as CSV"
        ) from None
    try:
        found: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from None
    return found


def _list_lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        name, mark, label = line.rpartition(",") if "," in line else line.rpartition(" ")
        if not mark or not name.strip():
            raise UserError(f"'{path}', line {number}: '{line[:80]}' is not 'path, label'")
        yield name.strip(), label.strip()


def text_of(value: Any) -> str:
    return "" if value is None else str(value).strip()
