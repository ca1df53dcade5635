"""Datasets of Hugging Face as sources: which columns hold images and labels, and which rows are which split.

The package `datasets` (the extra `datasets`) keeps their rows in memory-mapped files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coadvise.config.schema import DataConfig
from coadvise.data.images import read_file, typical_side
from coadvise.data.sources.folder import file_stamp
from coadvise.data.sources.hub import Found
from coadvise.data.sources.split import (
    TEST,
    TRAIN,
    VAL,
    Labels,
    Source,
    Split,
    chosen_classes,
    classes_of,
    divided,
    few,
    known_classes,
    named_splits,
    relabelled,
    split_note,
    used_classes,
    with_splits,
)
from coadvise.data.sources.table import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_COLUMNS,
    column_named,
    plain,
    splits_of_column,
    text_of,
)
from coadvise.errors import UserError


@dataclass(frozen=True, eq=False)
class DatasetSplit(Split):
    """Rows of a dataset; the images stay in its files.

    Attributes:
        images: the dataset with its column of images alone, which is not decoded.
        column: the name of that column.
        root: the folder that paths of images without bytes are relative to.
        paths: the path of each image of the dataset as stored, or null; a `pyarrow.StringArray`.
        outside: whether the dataset has an image's path alone.
        called: what the images are called; a `pyarrow.StringArray`, null for those called by `where` and their row.
        where: the dataset's own name of the split.
        version: text that changes with the dataset.
        rows: [N], of the dataset.
    """

    images: Any
    column: str
    root: Path
    paths: Any
    outside: npt.NDArray[np.bool_]
    called: Any
    where: str
    version: str
    rows: Labels
    labels: Labels

    def name(self, index: int) -> str:
        row = int(self.rows[index])
        return self.called[row].as_py() or _numbered(self.where, row)

    def read(self, index: int) -> bytes:
        row = int(self.rows[index])
        image = self.images[row][self.column]
        content = image.get("bytes") if isinstance(image, dict) else image
        if content is not None:
            return content
        path = self.paths[row].as_py()
        if path is None:
            raise OSError("the row has no image")
        return read_file(self.root / path)

    def stamp(self, index: int) -> str:
        row = int(self.rows[index])
        path = self.paths[row].as_py() if self.outside[row] else None
        return f"{self.version} {row}" + ("" if path is None else f" {file_stamp(self.root / path).hex()}")

    def names(self) -> list[str]:
        called = self.called.take(self.rows).to_pylist()
        return [name or _numbered(self.where, row) for name, row in zip(called, self.rows.tolist(), strict=True)]

    def subset(self, rows: Sequence[int] | Labels, labels: Labels | None = None) -> "DatasetSplit":
        chosen = np.asarray(rows, np.int64)
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen] if labels is None else labels)


def open_dataset(found: Found, how: DataConfig, seed: int) -> Source:
    """The source of a dataset, as `sources.open_source`.

    Raises:
        UserError: it cannot be opened, has no images or labels where they are looked for, or rows without a label.
    """
    opened = _Opened(found, how)
    if len(opened.counts) > 1 and not (TRAIN in opened.kinds and len(opened.kinds) > 1):
        raise UserError(
            f"'{found.where}' has the splits {few(list(opened.counts))}; one is needed to train on (usually train) and "
            "one to score on (validation or test); say which is which by data.splits={train: ..., val: ...}"
        )
    parts, labels, remarks = opened.parts((TRAIN, VAL, TEST))
    used = chosen_classes(found.where, labels, how.classes, how.exclude)
    classes = classes_of(used)
    if len(classes) < 2:
        raise UserError(
            f"'{found.where}' has {f'one label that is used, {few(classes)}' if classes else 'no label that is used'}; "
            "at least two are needed; see data.exclude, or name another column with data.label_column"
        )
    chosen = {kind: relabelled(part, [used.get(name) for name in labels], classes) for kind, part in parts.items()}
    if len(chosen) > 1:
        return with_splits(found.where, classes, chosen, split_note(opened.kinds), remarks)
    return divided(found.where, classes, chosen[TRAIN], how.val_fraction, seed, remarks, "dataset")


def evaluation_split(found: Found, classes: Sequence[str], how: DataConfig) -> Split:
    """As `sources.evaluation_split`."""
    part, labels, _ = _scored(found, how)
    used = used_classes(labels, how.classes, how.exclude)
    known_classes(found.where, used, classes)
    split = relabelled(part, [used.get(name) for name in labels], classes)
    if not len(split):
        raise UserError(f"'{found.where}' holds no images of the student's classes ({few(classes)})")
    return split


def evaluation_remarks(found: Found, how: DataConfig) -> tuple[str, ...]:
    """As `sources.evaluation_remarks`."""
    return _scored(found, how)[2]


def typical_size(found: Found, how: DataConfig, look_at: int = 100) -> int:
    """As `sources.typical_size`."""
    dataset = next(iter(found.open().values()))
    for column in [how.image_column] if how.image_column in dataset.features else _image_columns(dataset.features)[:1]:
        rows = np.arange(min(look_at, len(dataset)))
        split = _split(found, dataset, column, "", rows, rows)
        return typical_side(partial(split.read, index) for index in range(len(split)))
    return 0


class _Opened:
    """A dataset's splits.

    Attributes:
        counts: rows of each split, by the dataset's own names.
        kinds: which of them is which; empty where there is one split.
    """

    def __init__(self, found: Found, how: DataConfig, to_train: bool = True) -> None:
        self.found, self.how = found, how
        loaded = found.open()
        first = next(iter(loaded.values()))
        self.tables = {name: (dataset, np.arange(len(dataset))) for name, dataset in loaded.items()}
        splits = column_named(found.where, first.column_names, how.split_column, "split", SPLIT_COLUMNS, needed=False)
        if splits and len(loaded) == 1:
            codes, values = _values(first, splits)
            self.tables = {values[code]: (first, np.flatnonzero(codes == code)) for code in np.unique(codes)}
        elif how.split_column:
            raise UserError(
                f"'{found.where}' has the splits {few(list(loaded))}, so data.split_column={how.split_column} has no "
                "use; leave it out, or say which split is which by data.splits={train: ..., val: ...}"
            )
        self.counts = {name: len(rows) for name, (_, rows) in self.tables.items()}
        if splits and len(loaded) == 1:
            self.kinds = splits_of_column(found.where, self.counts, how, to_train)
        else:
            several = len(loaded) > 1 or how.splits
            self.kinds = named_splits(found.where, list(loaded), how.splits) if several else {}

    def parts(self, wanted: Sequence[str]) -> tuple[dict[str, DatasetSplit], tuple[str, ...], tuple[str, ...]]:
        """The splits of some kinds, or the only one as TRAIN; the names of their labels; what is left out, in lines.

        Their pictures are in the order of their labels' names, then of their paths, then of their rows.
        """
        used = {kind: self.kinds[kind] for kind in wanted if kind in self.kinds} or {TRAIN: next(iter(self.tables))}
        unused = [name for name in self.counts if name not in {*self.kinds.values(), *used.values()}]
        lines, texts, parts = list[str](), dict[str, tuple[str, ...]](), dict[str, DatasetSplit]()
        declared: set[str] = set()
        for kind, name in used.items():
            dataset, rows = self.tables[name]
            image, label = self._columns(dataset)
            codes, values = _values(dataset, label)
            there, codes = np.unique(codes[rows], return_inverse=True)
            of_part = tuple(values[code] for code in there)
            if kind != TRAIN and of_part == ("",):
                lines.append(f"left out, without labels: split '{name}' ({len(rows)} images)")
                del self.kinds[kind]
                continue
            declared |= {*getattr(dataset.features[label], "names", ())}
            texts[kind], parts[kind] = of_part, _split(self.found, dataset, image, name, rows, codes)
        labels = sorted({text for of_part in texts.values() for text in of_part})
        for kind, part in parts.items():
            places = np.array([labels.index(text) for text in texts[kind]], np.int64)
            parts[kind] = _in_order(replace(part, labels=places[part.labels]))
        parts = _named(parts, labels)
        self._check_labelled(parts, labels)
        if unused:
            counted = ", ".join(f"'{name}' ({self.counts[name]} rows)" for name in unused)
            lines.append(f"left out, neither usual splits nor named in data.splits: {counted}")
        if empty := sorted(declared - {*labels}):
            lines.append(f"left out, without an image: class(es) {few(empty)}")
        return parts, tuple(labels), tuple(lines)

    def _columns(self, dataset: Any) -> tuple[str, str]:
        """The columns of images and of labels."""
        where, features = self.found.where, dataset.features
        there = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
        given = self.how.image_column
        if given:
            column_named(where, list(features), given, "image", ())
        images = _image_columns(features, given)
        if not images:
            what = f"its column '{given}' holds no images" if given else "it has no image feature"
            raise UserError(
                f"'{where}' is a dataset, but {what}; its columns are {there}. Name a column of images with "
                "data.image_column; a column of paths becomes one by dataset.cast_column(NAME, datasets.Image())"
            )
        if len(images) > 1:
            raise UserError(
                f"'{where}' has {len(images)} columns of images, {few(images)}; name one with data.image_column"
            )
        label = self.how.label_column
        classed = [
            name for name in features if _kind(features[name]) == "ClassLabel" and plain(name) not in SPLIT_COLUMNS
        ]
        usual = [name for name in classed if plain(name) in LABEL_COLUMNS]
        if not label and len(classed) > 1 and len(usual) != 1:
            raise UserError(
                f"'{where}' has {len(classed)} columns of labels, {few(classed)}; name one with data.label_column"
            )
        label = column_named(where, list(features), label or (usual or classed or [""])[0], "label", LABEL_COLUMNS)
        if type(features[label]).__name__ not in ("ClassLabel", "Value"):
            raise UserError(
                f"'{where}': its column '{label}' holds {_kind(features[label])}, and an image needs one label; name "
                f"another with data.label_column; the columns are {there}"
            )
        return images[0], label

    def _check_labelled(self, parts: Mapping[str, DatasetSplit], labels: Sequence[str]) -> None:
        if "" not in labels or "" in self.how.exclude:
            return
        without = [
            part.name(int(row)) for part in parts.values() for row in np.flatnonzero(part.labels == labels.index(""))
        ]
        raise UserError(
            f"'{self.found.where}': {len(without)} row(s) have no label (null, or -1 of a ClassLabel), the first is "
            f"'{without[0]}'; fill them in or leave them out with data.exclude=['']"
        )


def _scored(found: Found, how: DataConfig) -> tuple[DatasetSplit, tuple[str, ...], tuple[str, ...]]:
    """The split to score a finished network on, the names of its labels, and what is left out."""
    opened = _Opened(found, how, to_train=False)
    kinds = [kind for kind in (TEST, VAL) if kind in opened.kinds]
    if len(opened.counts) > 1 and not kinds:
        raise UserError(
            f"'{found.where}' has the splits {few(list(opened.counts))}, and none is usually scored on (validation or "
            "test); save the one to score on by itself"
        )
    lines: list[str] = []
    for wanted in [[kind] for kind in kinds] or [[]]:
        parts, labels, remarks = opened.parts(wanted)
        lines += remarks
        if parts:
            return next(iter(parts.values())), labels, tuple(lines)
    raise UserError(f"'{found.where}' has no labels in {few(list(opened.counts))}; there is nothing to score on")


def _split(found: Found, dataset: Any, column: str, where: str, rows: Labels, labels: Labels) -> DatasetSplit:
    """Some rows of a dataset, without names."""
    import pyarrow
    from pyarrow import compute

    own, feature = dataset.select_columns([column]), dataset.features[column]
    if _kind(feature) == "Image":
        own = own.cast_column(column, type(feature)(mode=feature.mode, decode=False))
    stored = own.with_format("arrow")[:].column(column)  # a view of the files
    nothing = pyarrow.nulls(len(dataset), pyarrow.string())
    paths, outside = nothing, np.zeros(len(dataset), bool)
    if pyarrow.types.is_struct(stored.type):
        outside = compute.is_null(compute.struct_field(stored, "bytes")).to_numpy()
        if "path" in [field.name for field in stored.type]:
            paths = compute.struct_field(stored, "path").cast(pyarrow.string()).combine_chunks()
    files = [file_stamp(Path(file["filename"])).hex() for file in dataset.cache_files]
    version = " ".join([dataset._fingerprint, *files])
    return DatasetSplit(own, column, found.root, paths, outside, nothing, where, version, rows, labels)


def _named(parts: Mapping[str, DatasetSplit], labels: Sequence[str]) -> dict[str, DatasetSplit]:
    """With names: the stored paths, or SPLIT/LABEL/PATH where that alone tells them apart, or else numbers."""
    import pyarrow

    if _tell_apart(stored := {kind: replace(part, called=part.paths) for kind, part in parts.items()}):
        return stored
    longer = {}
    for kind, part in parts.items():
        called = np.full(len(part.paths), None, object)
        for row, label, path in zip(part.rows.tolist(), part.labels.tolist(), _paths(part), strict=True):
            called[row] = path and f"{part.where}/{labels[label]}/{path}"
        longer[kind] = replace(part, called=pyarrow.array(called, pyarrow.string()))
    return longer if _tell_apart(longer) else dict(parts)


def _tell_apart(parts: Mapping[str, DatasetSplit]) -> bool:
    """Whether all pictures are called differently."""
    names = {name for part in parts.values() for name in part.names()}
    return len(names) == sum(map(len, parts.values()))


def _in_order(part: DatasetSplit) -> DatasetSplit:
    """By label, then by path as folders are walked, then by row; `rows` are in order."""
    keys = [(path or "").replace("/", "\0") for path in _paths(part)]
    by_path = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    return part.subset(by_path[np.argsort(part.labels[by_path], kind="stable")])


def _paths(part: DatasetSplit) -> list[str | None]:
    return part.paths.take(part.rows).to_pylist()


def _numbered(where: str, row: int) -> str:
    return f"{where}/{row:06d}"


def _values(dataset: Any, column: str) -> tuple[Labels, tuple[str, ...]]:
    """Of each row, the place of a column's value among its values as text; the text is empty where there is none."""
    stored = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    names = getattr(dataset.features[column], "names", None)
    if names is not None:
        codes = stored.fill_null(-1).to_numpy()
        values = (*names, "")
        codes = np.where((codes < 0) | (codes >= len(names)), len(names), codes)
        return codes.astype(np.int64), values
    encoded = stored.combine_chunks().dictionary_encode()
    texts = [*map(text_of, encoded.dictionary.to_pylist()), ""]
    values = tuple(dict.fromkeys(texts))
    place = {text: code for code, text in enumerate(values)}
    places = np.array([place[text] for text in texts], np.int64)
    return places[encoded.indices.fill_null(len(texts) - 1).to_numpy().astype(np.int64)], values


def _kind(feature: Any) -> str:
    """What a column holds, in the words of `datasets`."""
    name = type(feature).__name__
    return str(feature.dtype) if name == "Value" else "struct" if name == "dict" else name


def _image_columns(features: Mapping[str, Any], given: str = "") -> list[str]:
    """The columns that hold images, or the given one if it does."""
    return [
        name
        for name, feature in features.items()
        if (name == given or not given)
        and (
            _kind(feature) == "Image"
            or (isinstance(feature, dict) and "bytes" in feature)
            or (_kind(feature) in ("binary", "large_binary") and (given or plain(name) in IMAGE_COLUMNS))
        )
    ]
