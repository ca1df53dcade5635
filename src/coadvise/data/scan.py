"""The first look at every picture: which can be read, how large they are, what they hold.

Pictures that are kept decoded, or scored, are decoded once. Of others only the header and both ends are read.
"""

import contextlib
import hashlib
import io
import itertools
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from coadvise.config import Fit, ImageSize, sides, size_text
from coadvise.data.images import (
    ENDS,
    Look,
    Need,
    Pixels,
    UnreadableImageError,
    Values,
    digest_of,
    fault,
    first_bits,
    fitted,
    fitted_size,
    is_whole,
    look,
    open_image,
    to_array,
    upright_size,
)
from coadvise.data.sources import Source, Split, resolved
from coadvise.data.sources.split import TRAIN, Keys, Labels
from coadvise.data.store import Decode, Decoded, Outcome, Seen, Store, open_store, presized, presized_size
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


PREPROCESSING = ("fit", "value_range")
MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images kept in memory
MANY = 20_000  # pictures whose headers are worth several processes
MEASURED = 2000  # pictures whose headers are read to foresee how much space presized ones take


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
        return self.look(row).image

    def look(self, row: int, need: Need | None = None) -> Look:
        """A picture, decoded to what is needed of it. Raises UnreadableImageError."""
        return _decoded(self.split, row, need, self.values)[1]

    def still(self, row: int, size: ImageSize) -> Pixels:
        """A picture as networks are scored on it, [3, H, W]. Raises UnreadableImageError."""
        keep = _still(size, self.fit)
        return keep.make(self.look(row, keep.need).image)

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
        return _threaded(lambda row: first_bits(_bytes(self.split, row)), rows)

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
            yield f"{self.digests[row]:016x} {self.labels[row]} {_one_line(self.split.name(row))}"
        if (lost := self.left_out) is not None:
            yield from (f"- {lost.labels[row]} {_one_line(lost.name(row))}" for row in range(len(lost)))


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


def scan(
    source: Source,
    image_size: ImageSize,
    in_memory: bool,
    presize: int = 0,
    say: Callable[[str], None] = lambda text: None,
    fit: Fit = "crop",
) -> Dataset:
    """Looks at every picture once, in threads, or takes what another process or run kept in the user's cache folder.

    Where nothing can be kept there, each process looks for itself.

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
    every = range(len(split))
    if not in_memory:
        return _scanned(split, [outcome for outcome, _ in _decode(split, None, every)], None, fit, values)
    _check_memory(len(split), image_size)
    pixels = np.empty((len(split), 3, *sides(image_size)), np.uint8)
    outcomes: list[Outcome] = []
    kept = 0
    for outcome, array in _decode(split, _still(image_size, fit, values, wide), every):
        outcomes.append(outcome)
        if array is not None:
            pixels[kept] = array
            kept += 1
    return _scanned(split, outcomes, pixels[:kept], fit, values)


def _train_split(
    source: Source, size: ImageSize | None, fit: Fit, presize: int, say: Callable[[str], None]
) -> ScannedSplit:
    """The training pictures; where some have more than 8 bits, all such are scaled by what these span together."""

    def scanned(values: Values | None, say: Callable[[str], None]) -> ScannedSplit:
        known = values is not None
        if presize:
            split = presized_split(source, TRAIN, presize, cache_folder(), say, values, wide=known)
            return replace(split, fit=fit)
        return _shared_split(source, TRAIN, size, fit, values, wide=known)

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
    split = source.splits[name]
    kind, need = "decoded", 0
    see: Decode = partial(_decode, split, None)
    if image_size is not None:
        square = isinstance(image_size, int) and fit == "crop"
        kind = f"{image_size} square" if square else f"{size_text(image_size)} {fit}"
        need = _check_memory(len(split), image_size)
        see = partial(_decode, split, _still(image_size, fit, values, wide))
    elif name == TRAIN:  # what fails later is replaced in training; a score must be over all that it says
        kind, see = "headers", partial(_look_at_headers, split)
    folder = cache_folder()
    if folder is not None and shutil.disk_usage(folder).free > need:
        with contextlib.suppress(OSError):
            store = _store(folder, source, name, kind, see, None if image_size is None else values)
            whole = image_size is not None and len(store) == int(store.readable.sum())
            pixels = store.stacked((3, *sides(image_size))) if whole and image_size is not None else None
            return replace(_from_store(split, store, pixels), fit=fit, values=values)
    if kind == "headers":
        return _scanned(split, [outcome for outcome, _ in see(np.arange(len(split)))], None, fit, values)
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
    split = source.splits[name]
    remedy = "set XDG_CACHE_HOME to a folder on a larger disk, or data.presize=0 to decode pictures for every view"
    if folder is None:
        raise UserError(f"there is no folder for presized images, ~/.cache/coadvise cannot be written; {remedy}")
    keep = Keep(partial(presized, side=side), lambda *whole: presized_size(whole, side), values, wide)

    def decode(rows: Labels) -> Decoded:
        need, free = _presized_bytes(split, side), shutil.disk_usage(folder).free
        room = f"{need / 2**30:.2f} GiB in '{folder}', where {free / 2**30:.2f} GiB are free"
        if need > free:
            raise UserError(f"{len(split)} presized images ({side} px) need {room}; {remedy}")
        say(f"presizing {len(rows)} images to {side} px, once: {room}")
        return _decode(split, keep, rows)

    try:
        store = _store(folder, source, name, f"{side} presized", decode, values)
    except OSError as error:
        raise UserError(f"presized images cannot be kept in '{folder}' ({error.strerror or error}); {remedy}") from None
    return replace(_from_store(split, store, presized=store), values=values)


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


def _store(folder: Path, source: Source, name: str, kind: str, see: Decode, values: Values | None) -> Store:
    """The store of a split, one for each source, choice of its classes, way of dividing it, and kind."""
    split = source.splits[name]
    kind += "" if values is None else " scaled"
    what = repr((resolved(source.where), source.classes, source.note, kind))
    place = hashlib.sha256(what.encode()).hexdigest()[:12]
    made = kind if values is None else f"{kind} {values}"
    return open_store(folder / "images" / f"{name}-{kind.replace(' ', '-')}-{place}", split.keys(), made, see)


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
    split: Split, outcomes: Sequence[Outcome], pixels: Pixels | None, fit: Fit, values: Values | None
) -> ScannedSplit:
    seen = [outcome for outcome in outcomes if isinstance(outcome, Seen)]
    spans = [one.span for one in seen if one.span is not None]
    return replace(
        _readable(split, {row: outcome for row, outcome in enumerate(outcomes) if isinstance(outcome, str)}),
        pixels=pixels,
        sizes=Counter((one.width, one.height) for one in seen),
        digests=np.array([one.digest for one in seen], np.uint64),
        contents=np.array([one.content for one in seen], np.uint64),
        fit=fit,
        values=values,
        span=(min(low for low, _ in spans), max(high for _, high in spans)) if spans else None,
    )


def _from_store(
    split: Split, store: Store, pixels: Pixels | None = None, presized: Store | None = None
) -> ScannedSplit:
    seen = store.table if not store.faults else store.table[store.readable]
    found, counts = np.unique(seen["width"].astype(np.int64) << 32 | seen["height"], return_counts=True)
    sizes = zip((found >> 32).tolist(), (found & (2**32 - 1)).tolist(), strict=True)
    return replace(
        _readable(split, store.faults),
        pixels=pixels,
        sizes=Counter(dict(zip(sizes, counts.tolist(), strict=True))),
        presized=presized,
        digests=seen["digest"],
        contents=seen["content"],
        kept=store,
        span=_span(seen["span"]),
    )


def _span(spans: npt.NDArray[np.float64]) -> Values | None:
    """Of spans [N, 2], NaN for pictures that have none."""
    known = spans[~np.isnan(spans[:, 0])]
    return (float(known[:, 0].min()), float(known[:, 1].max())) if len(known) else None


def _readable(split: Split, faults: Mapping[int, str]) -> ScannedSplit:
    """The pictures without a fault, by their row."""
    if not faults:
        return ScannedSplit(split, split.labels, None, (), Counter())
    rows = np.array(sorted(faults))
    kept = split.subset(np.delete(np.arange(len(split)), rows))
    return ScannedSplit(
        kept, kept.labels, None, tuple(faults[row] for row in rows.tolist()), Counter(), left_out=split.subset(rows)
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


def _bytes(split: Split, index: int) -> bytes:
    """A picture as it is encoded. Raises UnreadableImageError."""
    try:
        return split.read(index)
    except OSError as error:
        raise UnreadableImageError(fault(split.name(index), error)) from None


def _decoded(split: Split, index: int, need: Need | None = None, values: Values | None = None) -> tuple[bytes, Look]:
    """A picture's bytes and the picture, upright RGB. Raises UnreadableImageError."""
    content = _bytes(split, index)
    return content, look(content, split.name(index), need, values)


def _decode(split: Split, keep: Keep | None, rows: Sequence[int] | Labels) -> Decoded:
    return _threaded(partial(_decode_one, split, keep), rows)


def _decode_one(split: Split, keep: Keep | None, index: int) -> tuple[Outcome, Pixels | None]:
    try:
        content, found = _decoded(split, index, *((keep.need, keep.values) if keep else ()))
    except UnreadableImageError as error:
        return str(error), None
    seen = Seen(*found.size, digest_of(content, content, len(content)), first_bits(content), found.span)
    kept = keep is not None and (keep.wide or found.span is None)
    return seen, keep.make(found.image) if keep and kept else None


def _look_at_headers(split: Split, rows: Sequence[int] | Labels) -> Decoded:
    """In processes if there are many: Pillow reads headers in Python, so threads would wait for each other."""
    if len(rows) < MANY or available_cores() == 1:
        yield from (_look_at_header(split, int(row)) for row in rows)
        return
    global _forked_with
    _forked_with = split
    parts = np.array_split(np.asarray(rows), len(rows) // 512)
    with ProcessPoolExecutor(min(16, available_cores()), get_context("fork"), _ignore_interrupts) as pool:
        for found in pool.map(_look_at_some, parts):
            yield from ((outcome, None) for outcome in found)


_forked_with: Split | None = None  # what processes inherit instead of a copy


def _look_at_some(rows: Labels) -> list[Outcome]:
    assert _forked_with is not None
    return [_look_at_header(_forked_with, int(row))[0] for row in rows]


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits is interrupted, and ends these


def _look_at_header(split: Split, index: int) -> tuple[Outcome, None]:
    """A picture by its header and both ends of its file; decoded if these leave a doubt, for they name no fault."""
    with contextlib.suppress(Exception), split.open(index) as file:
        begin = end = file.read(2 * ENDS + 1)
        size = len(begin)
        if size > 2 * ENDS:
            size = file.seek(0, io.SEEK_END)
            file.seek(-ENDS, io.SEEK_END)
            end = file.read()
        with open_image(begin if size == len(begin) else file) as image:
            if is_whole(image, begin, end, size):
                content = first_bits(begin) if size <= 2 * ENDS else 0
                return Seen(*upright_size(image), content or digest_of(begin, end, size), content), None
    return _decode_one(split, None, index)[0], None


def _threaded(one: Callable[[int], T], indices: Sequence[int] | Labels) -> Iterator[T]:
    def several(numbers: Sequence[int] | Labels) -> list[T]:
        return [one(int(number)) for number in numbers]

    with ThreadPoolExecutor(min(16, available_cores())) as pool:
        for start in range(0, len(indices), 512):  # in slices, so that results do not pile up
            parts = [indices[at : at + 16] for at in range(start, min(start + 512, len(indices)), 16)]
            yield from itertools.chain.from_iterable(pool.map(several, parts))


def _one_line(name: str) -> str:
    """A name with what is not printable escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
