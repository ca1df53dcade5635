"""Decodes every picture once before training: which can be read, how large they are, what they hold."""

import contextlib
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from coadvise.config import Fit, ImageSize, sides, size_text
from coadvise.data.images import (
    Look,
    Need,
    Pixels,
    UnreadableImageError,
    Values,
    fault,
    fitted,
    fitted_size,
    look,
    open_image,
    to_array,
)
from coadvise.data.sources import Source, Split, resolved
from coadvise.data.store import Outcome, Seen, Store, fingerprint, open_store, presized, presized_size
from coadvise.errors import UserError
from coadvise.machine import available_cores, cache_folder

T = TypeVar("T")


@dataclass(frozen=True)
class Keep:
    """What is kept of each image: an array.

    Attributes:
        make: gives it.
        need: what `make` resizes a picture to.
        values: see `ScannedSplit`.
        wide: whether pictures of more than 8 bits are kept; they cannot be while their `values` are looked for.
    """

    make: Callable[[Image.Image], Pixels]
    need: Need
    values: Values | None = None
    wide: bool = True


MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images kept in memory
MEASURED = 2000  # pictures whose headers are read to foresee how much space presized ones take


@dataclass(frozen=True)
class ScannedSplit:
    """The readable pictures of a split, by row.

    Attributes:
        split: the readable pictures, in the source's order.
        labels: [N] int64, indices into the source's classes.
        pixels: [N, 3, H, W] uint8, or None where images are decoded when they are needed.
        unreadable: one line for each picture that could not be decoded: its name and why.
        sizes: how many images there are of each (width, height).
        presized: the images decoded and no larger than needed, or None where they are decoded again for every view.
        digests: 16 hexadecimal digits for each readable picture, of its bytes.
        left_out: the unreadable pictures.
        fit: how pictures of another shape than the networks' are fitted.
        values: what becomes black and white in pictures of more than 8 bits; None: each picture's own 8 or 16 bits.
        span: the smallest and largest value in all of those pictures; None where there are none.
    """

    split: Split
    labels: npt.NDArray[np.int64]
    pixels: Pixels | None
    unreadable: tuple[str, ...]
    sizes: Counter[tuple[int, int]]
    presized: Store | None = None
    digests: tuple[str, ...] = ()
    left_out: Split | None = None
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
        return self.look(row).image

    def look(self, row: int, need: Need | None = None) -> Look:
        """A picture, decoded to what is needed of it. Raises UnreadableImageError."""
        return _decoded(self.split, row, need, self.values)[1]

    def still(self, row: int, size: ImageSize) -> Pixels:
        """A picture as networks are scored on it, [3, H, W]. Raises UnreadableImageError."""
        keep = _still(size, self.fit)
        return keep.make(self.look(row, keep.need).image)

    @property
    def unusual(self) -> dict[str, Any]:
        """How pictures become pixels, as plain values, where it is not the usual way."""
        return ({} if self.fit == "crop" else {"fit": self.fit}) | (
            {} if self.values is None else {"value_range": list(self.values)}
        )

    def per_class(self, classes: int) -> list[int]:
        return np.bincount(self.labels, minlength=classes).tolist()

    @cached_property
    def sha256(self) -> str:
        """Of the readable pictures' digests, in order; names do not count."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def listing(self) -> list[str]:
        """A line `DIGEST LABEL NAME` for each picture; the digest of an unreadable one is "-"."""
        splits = [(self.split, self.digests)]
        if self.left_out is not None:
            splits.append((self.left_out, ("-",) * len(self.left_out)))
        return [
            f"{digest} {label} {_one_line(split.name(row))}"
            for split, digests in splits
            for row, (digest, label) in enumerate(zip(digests, split.labels.tolist(), strict=True))
        ]


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


def changes_of(old: Sequence[str], new: Sequence[str]) -> Changes:
    """What changed from one `ScannedSplit.listing` to another; the order of pictures does not count."""
    before, after = ({name: about for *about, name in (line.split(" ", 2) for line in lines)} for lines in (old, new))
    return Changes(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        replaced=tuple(name for name in after if name in before and after[name] != before[name]),
    )


def scan(
    source: Source,
    image_size: ImageSize,
    in_memory: bool,
    presize: int = 0,
    say: Callable[[str], None] = lambda text: None,
    fit: Fit = "crop",
) -> Dataset:
    """Decodes every picture once, in threads, or takes what another process or run kept in the user's cache folder.

    Where nothing can be kept there, each process decodes for itself.

    Args:
        image_size: pixels.
        in_memory: keep all images as `pixels`, which processes share.
        presize: shorter side, in pixels, of the training images to keep on disk; 0 keeps none.
        say: called with a line about what will be written there.
        fit: how pictures of another shape are fitted to that size.

    Raises:
        UserError: a class has no readable image to train on, none can be scored, the pixels do not fit into memory, or
            the presized images not onto the disk.
    """
    size = image_size if in_memory else None
    train = _train_split(source, size, fit, 0 if in_memory else presize, say)
    values = train.values
    val = _shared_split(source, "val", size, fit, values)
    test = None if source.test is None else _shared_split(source, "test", size, fit, values)
    for label, count in enumerate(train.per_class(len(source.classes))):
        if count == 0:
            lost = train.unreadable[np.flatnonzero(train.left_out.labels == label)[0]] if train.left_out else "none"
            raise UserError(f"class '{source.classes[label]}' has no readable image to train on; first fault: {lost}")
    for part in (val, test):
        if part is not None and not len(part):
            raise UserError(f"no readable image to score on in '{source.where}'; first fault: {part.unreadable[0]}")
    return Dataset(source, train, val, test)


def scan_split(
    split: Split,
    image_size: ImageSize,
    in_memory: bool,
    fit: Fit = "crop",
    values: Values | None = None,
    wide: bool = True,
) -> ScannedSplit:
    """Decodes every picture of a split; leaves out those that cannot be read. Nothing is kept on disk.

    Args:
        image_size, in_memory, fit: as for `scan`.
        values: see `ScannedSplit`.
        wide: see `Keep`.
    """
    if not in_memory:
        outcomes = [outcome for outcome, _ in _decode(split, None)]
        return _scanned(split, outcomes, fit=fit, values=values)
    _check_memory(len(split), image_size)
    pixels = np.empty((len(split), 3, *sides(image_size)), np.uint8)
    outcomes = list[Outcome]()
    kept = 0
    for outcome, array in _decode(split, _still(image_size, fit, values, wide)):
        outcomes.append(outcome)
        if array is not None:
            pixels[kept] = array
            kept += 1
    return _scanned(split, outcomes, pixels[:kept], fit=fit, values=values)


def _train_split(
    source: Source, size: ImageSize | None, fit: Fit, presize: int, say: Callable[[str], None]
) -> ScannedSplit:
    """The training pictures; where some have more than 8 bits, all such are scaled by what these span together."""

    def scanned(values: Values | None, say: Callable[[str], None]) -> ScannedSplit:
        known = values is not None
        if presize:
            split = presized_split(source, "train", presize, cache_folder(), say, values, wide=known)
            return replace(split, fit=fit)
        return _shared_split(source, "train", size, fit, values, wide=known)

    train = scanned(None, say)
    if train.span is None:
        return train
    return replace(train, values=train.span) if size is None and not presize else scanned(train.span, lambda text: None)


def _shared_split(
    source: Source,
    name: str,
    image_size: ImageSize | None,
    fit: Fit,
    values: Values | None = None,
    wide: bool = True,
) -> ScannedSplit:
    """A split scanned once for all processes and runs, with pixels of a size or without."""
    split: Split = getattr(source, name)
    keep, kind, need = None, "seen", 0
    if image_size is not None:
        keep, need = _still(image_size, fit, values, wide), _check_memory(len(split), image_size)
        square = isinstance(image_size, int) and fit == "crop"
        kind = f"{image_size} square" if square else f"{size_text(image_size)} {fit}"
    folder = cache_folder()
    if folder is not None and shutil.disk_usage(folder).free > need:
        with contextlib.suppress(OSError):
            store = _store(folder, source, name, kind, keep)
            pixels = None
            if image_size is not None and len(store) == sum(isinstance(one, Seen) for one in store.outcomes):
                pixels = store.stacked((3, *sides(image_size)))
            return _scanned(split, store.outcomes, pixels, fit=fit, values=values)
    return scan_split(split, image_size or 0, image_size is not None, fit, values, wide)


def presized_split(
    source: Source,
    name: str,
    side: int,
    folder: Path | None,
    say: Callable[[str], None],
    values: Values | None = None,
    wide: bool = True,
) -> ScannedSplit:
    """Images with a shorter side of at most `side` pixels, in a file below `folder`. Raises UserError for no room."""
    split: Split = getattr(source, name)
    remedy = "set XDG_CACHE_HOME to a folder on a larger disk, or data.presize=0 to decode pictures for every view"
    if folder is None:
        raise UserError(f"there is no folder for presized images, ~/.cache/coadvise cannot be written; {remedy}")

    def announce() -> None:
        need, free = _presized_bytes(split, side), shutil.disk_usage(folder).free
        room = f"{need / 2**30:.2f} GiB in '{folder}', where {free / 2**30:.2f} GiB are free"
        if need > free:
            raise UserError(f"{len(split)} presized images ({side} px) need {room}; {remedy}")
        say(f"presizing {len(split)} images to {side} px, once: {room}")

    keep = Keep(partial(presized, side=side), lambda *whole: presized_size(whole, side), values, wide)
    try:
        store = _store(folder, source, name, f"{side} presized", keep, announce)
    except OSError as error:
        raise UserError(f"presized images cannot be kept in '{folder}' ({error.strerror or error}); {remedy}") from None
    return _scanned(split, store.outcomes, presized=store, values=values)


def scored_and_trained_on(dataset: Dataset) -> list[tuple[str, str]]:
    """Names of scored pictures that are training pictures too, byte for byte: the one and the other."""
    trained = dict(zip(dataset.train.digests, range(len(dataset.train)), strict=True))
    return [
        (dataset.scored.name(row), dataset.train.name(trained[digest]))
        for row, digest in enumerate(dataset.scored.digests)
        if digest in trained
    ]


def under_two_labels(dataset: Dataset) -> list[tuple[str, str]]:
    """Names of pictures that are the same, byte for byte, but have different labels, in any split: two of each."""
    first: dict[str, tuple[int, str]] = {}
    found: dict[str, tuple[str, str]] = {}
    for split in dataset.splits.values():
        for row, (digest, label) in enumerate(zip(split.digests, split.labels.tolist(), strict=True)):
            seen, name = first.setdefault(digest, (label, split.name(row)))
            if seen != label:
                found.setdefault(digest, (name, split.name(row)))
    return list(found.values())


def _store(
    folder: Path, source: Source, name: str, kind: str, keep: Keep | None, announce: Callable[[], None] = lambda: None
) -> Store:
    """The store of a split, one for each source, choice of its classes, way of dividing it, and kind."""
    split: Split = getattr(source, name)
    values = None if keep is None else keep.values
    kind += "" if values is None else " scaled"
    what = repr((resolved(source.where), source.classes, source.note, kind))
    digest = hashlib.sha256(what.encode()).hexdigest()[:12]

    def decode() -> Iterator[tuple[Outcome, Pixels | None]]:
        announce()
        return _decode(split, keep)

    place = folder / "images" / f"{name}-{kind.replace(' ', '-')}-{digest}"
    return open_store(place, fingerprint(split, kind if values is None else f"{kind} {values}"), decode)


def _check_memory(images: int, image_size: ImageSize) -> int:
    """Bytes that decoded images take. Raises UserError for too many."""
    height, width = sides(image_size)
    need = images * 3 * height * width
    if need > MEMORY_LIMIT:
        raise UserError(
            f"{images} images at {size_text(image_size)} px need {need / 2**30:.1f} GiB decoded, and at most "
            f"{MEMORY_LIMIT / 2**30:.0f} GiB are kept in memory; use augment.kind=deit, which decodes them as needed"
        )
    return need


def _scanned(
    split: Split,
    outcomes: Sequence[Outcome],
    pixels: Pixels | None = None,
    presized: Store | None = None,
    fit: Fit = "crop",
    values: Values | None = None,
) -> ScannedSplit:
    seen = [outcome for outcome in outcomes if isinstance(outcome, Seen)]
    spans = [one.span for one in seen if one.span is not None]
    faults = np.array([isinstance(outcome, str) for outcome in outcomes], bool)
    readable = split.subset(np.flatnonzero(~faults)) if faults.any() else split
    return ScannedSplit(
        split=readable,
        labels=readable.labels,
        pixels=pixels,
        unreadable=tuple(outcome for outcome in outcomes if isinstance(outcome, str)),
        sizes=Counter((one.width, one.height) for one in seen),
        presized=presized,
        digests=tuple(one.digest for one in seen),
        left_out=split.subset(np.flatnonzero(faults)) if faults.any() else None,
        fit=fit,
        values=values,
        span=(min(low for low, _ in spans), max(high for _, high in spans)) if spans else None,
    )


def _still(size: ImageSize, fit: Fit, values: Values | None = None, wide: bool = True) -> Keep:
    """Images as networks are scored on them, [3, H, W]."""

    def make(image: Image.Image) -> Pixels:
        return to_array(fitted(image, size, fit))

    return Keep(make, partial(fitted_size, size=size, fit=fit), values, wide)


def _presized_bytes(split: Split, side: int) -> int:
    """About how many bytes the presized images take, by the headers of some of them."""

    def one(index: int) -> int:
        try:
            with open_image(split.read(index)) as image:
                width, height = presized_size(image.size, side)
        except Exception:  # whatever is wrong with it, the scan names it
            return 0
        return 3 * width * height

    some = np.linspace(0, len(split), min(len(split), MEASURED), endpoint=False).astype(int).tolist()
    return sum(_threaded(one, some)) * len(split) // len(some)


def _decoded(split: Split, index: int, need: Need | None = None, values: Values | None = None) -> tuple[bytes, Look]:
    """A picture's bytes and the picture, upright RGB. Raises UnreadableImageError."""
    name = split.name(index)
    try:
        content = split.read(index)
    except OSError as error:
        raise UnreadableImageError(fault(name, error)) from None
    return content, look(content, name, need, values)


def _decode(split: Split, keep: Keep | None) -> Iterator[tuple[Outcome, Pixels | None]]:
    def one(index: int) -> tuple[Outcome, Pixels | None]:
        try:
            content, found = _decoded(split, index, *((keep.need, keep.values) if keep else ()))
        except UnreadableImageError as error:
            return str(error), None
        seen = Seen(*found.size, hashlib.sha256(content).hexdigest()[:16], found.span)
        kept = keep is not None and (keep.wide or found.span is None)
        return seen, keep.make(found.image) if keep and kept else None

    return _threaded(one, range(len(split)))


def _threaded(one: Callable[[int], T], indices: Sequence[int]) -> Iterator[T]:
    with ThreadPoolExecutor(min(16, available_cores())) as pool:
        for start in range(0, len(indices), 512):  # in slices, so that results do not pile up
            yield from pool.map(one, indices[start : start + 512])


def _one_line(name: str) -> str:
    """A name with what is not printable escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
