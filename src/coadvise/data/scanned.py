"""A scanned source: all that training and evaluation need to know about the data."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from coadvise.config.schema import Fit, ImageSize
from coadvise.data.decoding import decoded, read_bytes, still, threaded
from coadvise.data.images import DecodedImage, Need, Pixels, Values, first_bits
from coadvise.data.sources import Source, Split
from coadvise.data.sources.split import Keys, Labels
from coadvise.data.store import Store

PREPROCESSING = ("fit", "value_range")


def _none() -> Keys:
    return np.empty(0, np.uint64)


@dataclass(frozen=True)
class ScannedSplit:
    """The readable pictures of a split, by row.

    Attributes:
        split: the readable pictures, in the source's order.
        labels: [N] int64, indices into the source's classes.
        pixels: [N, 3, H, W] uint8, or None where images are decoded when they are needed.
        unreadable: one line for each picture that could not be read: its name and why.
        sizes: how many images there are of each (width, height).
        presized: the images decoded and no larger than needed, or None where they are decoded again for every view.
        digests: [N] uint64, of each readable picture's bytes, or of a large file's ends and size: see `digest_of`.
        left_out: the unreadable pictures.
        contents: [N] uint64, of all bytes of each; 0 where not all were read.
        kept: where the scan is kept.
        fit: how pictures of another shape than the networks' are fitted.
        values: what becomes black and white in pictures of more than 8 bits; None: each picture's own 8 or 16 bits.
        span: the smallest and largest value in all of those pictures; None where there are none.
    """

    split: Split
    labels: Labels
    pixels: Pixels | None
    unreadable: tuple[str, ...]
    sizes: Counter[tuple[int, int]]
    presized: Store | None = None
    digests: Keys = field(default_factory=_none)
    left_out: Split | None = None
    contents: Keys = field(default_factory=_none)
    kept: Store | None = None
    fit: Fit = "crop"
    values: Values | None = None
    span: Values | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        """What the user knows a picture by."""
        return self.split.name(row)

    def read(self, row: int) -> bytes:
        """An encoded picture. Raises OSError."""
        return self.split.read(row)

    def picture(self, row: int) -> Image.Image:
        """A picture, decoded to upright RGB. Raises UnreadableImageError."""
        return self.decoded(row).image

    def decoded(self, row: int, need: Need | None = None) -> DecodedImage:
        """A picture, decoded to what is needed of it. Raises UnreadableImageError."""
        return decoded(self.split, row, need, self.values)[1]

    def still(self, row: int, size: ImageSize) -> Pixels:
        """A picture as networks are scored on it, [3, H, W]. Raises UnreadableImageError."""
        keep = still(size, self.fit)
        return keep.make(self.decoded(row, keep.need).image)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How pictures become pixels, as plain values by `PREPROCESSING`, where it is not the usual way."""
        return ({} if self.fit == "crop" else {"fit": self.fit}) | (
            {} if self.values is None else {"value_range": list(self.values)}
        )

    def per_class(self, classes: int) -> list[int]:
        return np.bincount(self.labels, minlength=classes).tolist()

    @cached_property
    def sha256(self) -> str:
        """Of all bytes of the readable pictures, in order; names do not count. Files are read where needed, once.

        Raises:
            UnreadableImageError: a file can no longer be read.
        """
        contents = self.contents
        if not contents.all() and self.kept is not None:
            contents = self.kept.contents(self._read_whole)
        elif len(missing := np.flatnonzero(contents == 0)):
            contents = contents.copy()
            contents[missing] = [*self._read_whole(missing.tolist())]
        return hashlib.sha256(contents.astype(">u8").tobytes().hex().encode()).hexdigest()

    def _read_whole(self, rows: list[int]) -> Iterator[int]:
        return threaded(lambda row: first_bits(read_bytes(self.split, row)), rows)

    @cached_property
    def identity(self) -> str:
        """A sha256 that differs where `listing` does, found faster."""
        whole = hashlib.sha256(self.digests.tobytes())
        for split in filter(None, (self.split, self.left_out)):
            whole.update(split.labels.tobytes())
            for row in range(len(split)):
                whole.update(f"{split.name(row)}\0".encode())
        return whole.hexdigest()

    def listing(self) -> Iterator[str]:
        """A line `DIGEST LABEL NAME` for each picture; the digest of an unreadable one is "-"."""
        for row in range(len(self)):
            yield f"{self.digests[row]:016x} {self.labels[row]} {one_line(self.split.name(row))}"
        if (lost := self.left_out) is not None:
            yield from (f"- {lost.labels[row]} {one_line(lost.name(row))}" for row in range(len(lost)))


@dataclass(frozen=True)
class Dataset:
    """A scanned source: all that training and evaluation need to know about the data."""

    source: Source
    train: ScannedSplit
    val: ScannedSplit
    test: ScannedSplit | None = None

    @property
    def splits(self) -> dict[str, ScannedSplit]:
        """By name, in order."""
        return {"train": self.train, "val": self.val} | ({} if self.test is None else {"test": self.test})

    @property
    def scored(self) -> ScannedSplit:
        """What finished networks are scored on: the test images where there are some apart from the validation's."""
        return self.splits[self.scored_name]

    @property
    def scored_name(self) -> str:
        return "val" if self.test is None else "test"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes


@dataclass(frozen=True)
class Changes:
    """How one listing of pictures differs from an older one, by names. False where it does not."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()  # of other bytes, or in another class

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.replaced)

    def __str__(self) -> str:
        """As "2 added ('train/a/1.jpg' first), 1 replaced ('train/a/3.jpg')"."""
        kinds = (("added", self.added), ("removed", self.removed), ("replaced", self.replaced))
        parts = [f"{len(names)} {what} ({names[0]!r}{' first' if names[1:] else ''})" for what, names in kinds if names]
        return ", ".join(parts) or "in another order"


def changes_of(old: Iterable[str], new: Iterable[str]) -> Changes:
    """What changed from one `ScannedSplit.listing` to another; the order of pictures does not count."""
    before, after = ({name: about for *about, name in (line.split(" ", 2) for line in lines)} for lines in (old, new))
    return Changes(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        replaced=tuple(name for name in after if name in before and after[name] != before[name]),
    )


def scored_and_trained_on(dataset: Dataset) -> list[tuple[str, str]]:
    """Names of scored pictures that are training pictures too, by their digests: the one and the other."""
    scored, train = dataset.scored, dataset.train
    order = np.argsort(train.digests, kind="stable")
    both = np.flatnonzero(np.isin(scored.digests, train.digests))
    places = order[np.searchsorted(train.digests, scored.digests[both], sorter=order)]
    return [(scored.name(row), train.name(place)) for row, place in zip(both.tolist(), places.tolist(), strict=True)]


def under_two_labels(dataset: Dataset) -> list[tuple[str, str]]:
    """Names of pictures that are the same by their digests but have different labels, in any split: two of each."""
    splits = [*dataset.splits.values()]
    digests, labels = (np.concatenate([getattr(split, what) for split in splits]) for what in ("digests", "labels"))
    starts = np.cumsum([0, *map(len, splits)])
    order = np.lexsort((labels, digests))
    same, other = order[:-1], order[1:]
    pairs = (digests[same] == digests[other]) & (labels[same] != labels[other])

    def name(at: int) -> str:
        number = int(np.searchsorted(starts, at, side="right")) - 1
        return splits[number].name(at - int(starts[number]))

    found: dict[int, tuple[str, str]] = {}
    for one, two in zip(same[pairs].tolist(), other[pairs].tolist(), strict=True):
        found.setdefault(int(digests[one]), (name(min(one, two)), name(max(one, two))))
    return list(found.values())


def one_line(name: str) -> str:
    """A name with what is not printable escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
