"""What is where in a set of shards. `index.json` is written last; what it names has its size and sha256 there.

index.json            classes, how the splits came about, and of each split the shards and the two files below
SPLIT.table           a row for each picture, in the order of the source that was written
SPLIT.names           the pictures' names, one after the other
SPLIT/NNNNNN.tar      pictures and labels in WebDataset's form, called by the picture's number in its split
SPLIT/NNNNNN.json     what is in this shard and what it was made of; read again only when shards are written
plan.json             how many pictures a shard has, and of what
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coadvise.data.shards.cache import Kept
from coadvise.errors import UserError

FORMAT = 1
INDEX, PLAN = "index.json", "plan.json"
# Where a picture is; its label and its key (see `Split.keys`); what `store.Seen` holds, a width of 0 where it could not
# be decoded; and where its name is.
ROW = np.dtype([
    ("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("label", "<u4"), ("key", "<u8"), ("width", "<i4"),
    ("height", "<i4"), ("digest", "<u8"), ("content", "<u8"), ("span", "<f8", (2,)), ("name", "<u8"),
    ("name_bytes", "<u4"),
])  # fmt: skip
IN_SHARD = ("offset", "length", "width", "height", "digest", "content", "span")  # what a shard's own JSON has of ROW
Rows = npt.NDArray[np.void]


@dataclass(frozen=True)
class SplitIndex:
    """The files of one split."""

    shards: tuple[Kept, ...]
    table: Kept
    names: Kept

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Index:
    """A set of shards, as `Source` without its pictures.

    Attributes:
        name: what the data were called that were written.
        presize: the shorter side that pictures were resized to, pixels; 0: they are as they were.
        splits: by "train", "val" and "test".
    """

    name: str
    classes: tuple[str, ...]
    note: str
    presize: int
    splits: Mapping[str, SplitIndex]


def shard_name(split: str, number: int) -> str:
    return f"{split}/{number:06d}.tar"


def about_name(split: str, number: int) -> str:
    return f"{split}/{number:06d}.json"


def written(index: Index) -> bytes:
    """`index.json`."""

    def plain(file: Kept) -> dict[str, Any]:
        return {"bytes": file.bytes, "sha256": file.sha256}

    splits = {
        name: {"table": plain(split.table), "names": plain(split.names), "shards": [*map(plain, split.shards)]}
        for name, split in index.splits.items()
    }
    about = {"format": FORMAT, "name": index.name, "classes": index.classes, "note": index.note}
    return json.dumps({**about, "presize": index.presize, "splits": splits}).encode()


def parsed(where: str, content: bytes) -> Index:
    """What `written` gave. Raises UserError for anything else."""
    try:
        found = json.loads(content)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, this version of coadvise reads {FORMAT}")
        classes = tuple(map(str, found["classes"]))
        splits = {name: _split(name, found["splits"][name]) for name in ("train", "val", "test")
                  if name in found["splits"]}  # fmt: skip
        if "train" not in splits or len(splits) == 1:
            raise ValueError("it has no split to train on, or none to score on")
        return Index(str(found["name"]), classes, str(found["note"]), int(found["presize"]), splits)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"'{where}/{INDEX}' is no index of shards that this version reads ({why}); write the shards with "
            "'coadvise shard DATA --out URL'"
        ) from None


def _split(name: str, found: Mapping[str, Any]) -> SplitIndex:
    shards = (_kept(shard_name(name, number), about) for number, about in enumerate(found["shards"]))
    return SplitIndex(tuple(shards), _kept(f"{name}.table", found["table"]), _kept(f"{name}.names", found["names"]))


def _kept(name: str, about: Mapping[str, Any]) -> Kept:
    size, sha256 = about["bytes"], about["sha256"]
    if not isinstance(size, int) or size < 0 or not re.fullmatch("[0-9a-f]{64}", sha256):  # it is a file's name
        raise ValueError(f"the size or sha256 of {name} is none")
    return Kept(name, size, sha256)


def check_rows(where: str, rows: Rows, shards: Sequence[Kept], classes: int) -> None:
    """Raises UserError for rows that lead out of the shards or of the classes."""
    sizes = np.array([shard.bytes for shard in shards], np.uint64)
    numbers = np.minimum(rows["shard"], max(0, len(shards) - 1))
    inside = (rows["shard"] < len(shards)) & (rows["label"] < classes) & (rows["length"] <= sizes[numbers])
    if not (inside & (rows["offset"] <= sizes[numbers] - rows["length"])).all():
        raise UserError(f"'{where}': its table names places that no shard has; write the shards again")
