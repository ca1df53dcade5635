"""Tar shards that `coadvise shard` wrote, behind a path or an address: `shards:URL`.

Their splits, classes, order of pictures and names are those of the source that was written, so unchanged pictures give
the same numbers. Nothing is read of a picture until it is needed: all that a scan looks for is in the index.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coadvise.config.schema import DataConfig
from coadvise.data.images import first_bits
from coadvise.data.shards.cache import changed
from coadvise.data.shards.index import INDEX, ROW, Index, Rows, check_rows, parsed
from coadvise.data.shards.place import FIRST_WAITS, Beat, Place, reason
from coadvise.data.shards.reader import Files
from coadvise.data.sources.names import Names
from coadvise.data.sources.split import (
    TEST,
    TRAIN,
    VAL,
    Keys,
    Labels,
    Source,
    Split,
    chosen_classes,
    classes_of,
    few,
    known_classes,
    relabelled,
    used_classes,
    with_splits,
)
from coadvise.errors import StorageError, UserError

PREFIX = "shards:"


@dataclass(frozen=True, eq=False)
class _Shards:
    """One split of a set, whole. Pickles without what is mapped.

    Attributes:
        files: the shards, then the table and the names.
        whole: whether a shard is fetched for one picture: the cache holds all, or they are this machine's.
    """

    files: Files
    classes: int
    whole: bool

    @cached_property
    def table(self) -> Rows:
        rows = self.files.reader.mapped(len(self.files.files) - 2, ROW)
        check_rows(self.files.place.url, rows, self.files.files[:-2], self.classes)
        return rows

    @cached_property
    def places(self) -> tuple[npt.NDArray[np.generic], ...]:
        """Of each row the shard, the offset there and the length: columns, which are quicker to read than rows."""
        return tuple(self.table[field] for field in ("shard", "offset", "length"))

    @cached_property
    def text(self) -> npt.NDArray[np.uint8]:
        return self.files.reader.mapped(len(self.files.files) - 1, np.dtype(np.uint8))

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("files", "classes", "whole")}


@dataclass(frozen=True, eq=False)
class ShardSplit(Split):
    """Pictures in shards.

    Attributes:
        rows: [N], of the table.
        window: shards whose pictures are shuffled together; 0 where all are, or nothing is shuffled.
    """

    shards: _Shards
    rows: Labels
    labels: Labels
    window: int

    def name(self, index: int) -> str:
        row = self.shards.table[int(self.rows[index])]
        start = int(row["name"])
        return self.shards.text[start : start + int(row["name_bytes"])].tobytes().decode(errors="backslashreplace")

    def names(self) -> list[str]:
        rows = self.shards.table[self.rows]
        names = Names(self.shards.text, rows["name"].astype(np.int64), rows["name_bytes"].astype(np.int32))
        return [names[index].decode(errors="backslashreplace") for index in range(len(names))]

    def read(self, index: int) -> bytes:
        row = self.rows.item(index)
        shard, offset, length = (column.item(row) for column in self.shards.places)
        reader = self.shards.files.reader
        if (content := reader.bytes_of(shard, offset, length)) is not None:
            return content
        if self.shards.whole:
            reader.open([shard], lambda: None)
            return self.read(index)
        content = reader.ranged(shard, offset, length)
        if first_bits(content) != self.shards.table["content"].item(row):
            raise changed(self.shards.files.place.url, self.shards.files.files[shard], f"at {self.name(index)!r}")
        return content

    def stamp(self, index: int) -> str:
        return f"{int(self.shards.table[int(self.rows[index])]['key']):016x}"

    def keys(self) -> Keys:
        return self.shards.table["key"][self.rows]

    def subset(self, rows: Sequence[int] | Labels, labels: Labels | None = None) -> "ShardSplit":
        chosen = np.asarray(rows, np.int64)
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen] if labels is None else labels)

    def facts(self, rows: Labels) -> Rows:
        return self.shards.table[self.rows[rows]]

    def windows(self) -> tuple[Labels, int] | None:
        return (self.shards.table["shard"][self.rows].astype(np.int64), self.window) if self.window else None

    def bring(self, rows: Labels, beat: Beat) -> None:
        self.shards.files.reader.open(self._numbers(rows), beat)

    def bring_soon(self, rows: Labels) -> None:
        self.shards.files.reader.open_soon(self._numbers(rows))

    def _numbers(self, rows: Labels) -> list[int]:
        return list(dict.fromkeys(self.shards.table["shard"][self.rows[rows]].tolist()))


def open_shards(data: str, how: DataConfig) -> Source:
    """The source of a set, as `sources.open_source`.

    Raises:
        UserError: nobody answers there, it may not be read, there are no shards, or they do not fit the cache.
    """
    place, index = _opened(data)
    splits: dict[str, Split] = {**_splits(place, index, how)}
    used = chosen_classes(data, index.classes, how.classes, how.exclude)
    classes = classes_of(used)
    if len(classes) < 2:
        raise UserError(f"'{data}' has one class that is used, {few(classes)}; at least two are needed")
    if classes != index.classes:
        own = [used.get(name) for name in index.classes]
        splits = {kind: relabelled(split, own, classes) for kind, split in splits.items()}
    note = f"{index.note}; shards of '{index.name}'" + (f", resized to {index.presize} px" if index.presize else "")
    return with_splits(data, classes, splits, note, ())


def evaluation_split(data: str, classes: Sequence[str], how: DataConfig) -> Split:
    """As `sources.evaluation_split`."""
    place, index = _opened(data)
    splits = _splits(place, index, how)
    used = used_classes(index.classes, how.classes, how.exclude)
    known_classes(data, used, classes)
    split = relabelled(splits.get(TEST) or splits[VAL], [used.get(name) for name in index.classes], classes)
    if not len(split):
        raise UserError(f"'{data}' holds no images of the student's classes ({few(classes)})")
    return split


def typical_size(data: str, look_at: int = 100) -> int:
    """As `sources.typical_size`."""
    place, index = _opened(data)
    train = _splits(place, index, DataConfig(cache_gb=1e9))[TRAIN]
    some = train.facts(np.arange(min(look_at, len(train))))
    known = some[some["width"] > 0]
    return int(np.median(np.minimum(known["width"], known["height"]))) if len(known) else 0


def place_of(data: str) -> Place:
    """What follows `shards:`."""
    return Place(data.removeprefix(PREFIX).rstrip("/") or "/")


def resolved(data: str) -> str:
    """With an absolute path, if it is one."""
    local = place_of(data).local
    return data if local is None else PREFIX + str(local.resolve())


def short_name(data: str) -> str:
    """The last part of the address."""
    return Path(place_of(resolved(data)).url).name


def _opened(data: str) -> tuple[Place, Index]:
    if not data.removeprefix(PREFIX):
        raise UserError(f"'{data}' names no shards; give {PREFIX}DIR or an address such as {PREFIX}s3://BUCKET/PATH")
    place = place_of(data)
    try:
        return place, parsed(place.url, place.read(INDEX, waits=FIRST_WAITS))
    except FileNotFoundError:
        raise UserError(
            f"there are no shards at '{place.url}' (no {INDEX}); write them with 'coadvise shard DATA --out "
            f"{place.url}', or wait until that has ended"
        ) from None
    except PermissionError as error:
        raise UserError(
            f"'{place.url}' may not be read: {reason(error)}; check the name of the bucket and your credentials"
        ) from None
    except StorageError as error:
        why = str(error).partition(" cannot be reached: ")[2].partition("; once it can")[0] or str(error)
        raise UserError(f"nobody answers for '{place.url}': {why}; check the address and the network") from None


def _splits(place: Place, index: Index, how: DataConfig) -> dict[str, ShardSplit]:
    """Every split, in the order in which it was written."""
    most = int(how.cache_gb * 1e9)
    whole = place.local is not None or sum(split.bytes for split in index.splits.values()) <= most
    splits: dict[str, ShardSplit] = {}
    for name, split in index.splits.items():
        windowed = name == TRAIN and how.window < len(split.shards)
        if name == TRAIN and not whole:
            together = min(2 * how.window, len(split.shards))  # the next window is fetched while one is read
            need = together * max(shard.bytes for shard in split.shards)
            if need > most:
                raise UserError(
                    f"data.window={how.window} needs {together} shards at a time, {need / 1e9:.2g} GB of this node's "
                    f"disk, and data.cache_gb={how.cache_gb:g} allows less; allow more, or give a smaller window"
                )
        if windowed and how.balance == "sampler":
            raise UserError(
                f"data.balance=sampler draws from all pictures at once, and these {len(split.shards)} shards are read "
                f"{how.window} at a time; use data.balance=loss, or data.window={len(split.shards)}"
            )
        files = Files(place, (*split.shards, split.table, split.names), most)
        shards = _Shards(files, len(index.classes), whole)
        with_table = _explained(place, shards)
        labels = with_table["label"].astype(np.int64)
        splits[name] = ShardSplit(shards, np.arange(len(labels)), labels, how.window if windowed else 0)
    return splits


def _explained(place: Place, shards: _Shards) -> Rows:
    try:
        shards.text  # noqa: B018  (fetched before anything is written)
        return shards.table
    except StorageError as error:
        raise UserError(f"the index of '{place.url}' cannot be read: {error}") from None
