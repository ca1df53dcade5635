"""The first look at every picture: which can be read, how large they are, what they hold.

Pictures that are kept decoded, or scored, are decoded once. Of others only the header and both ends are read.
"""

import contextlib
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coadvise.config.schema import Fit, ImageSize, sides, size_text
from coadvise.data.decoding import Keep, decode_rows, look_at_headers, still, threaded
from coadvise.data.images import (
    Pixels,
    Values,
    open_image,
)
from coadvise.data.scanned import Dataset, ScannedSplit
from coadvise.data.sources import Source, Split, resolved
from coadvise.data.sources.split import TRAIN, Labels
from coadvise.data.store import (
    Decode,
    Decoded,
    Outcome,
    Seen,
    Store,
    known_span,
    open_store,
    presized,
    presized_size,
)
from coadvise.errors import UserError
from coadvise.machine import cache_folder

MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images kept in memory
MEASURED = 2000  # pictures whose headers are read to foresee how much space presized ones take


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
        return _scanned(split, [outcome for outcome, _ in decode_rows(split, None, every)], None, fit, values)
    _check_memory(len(split), image_size)
    pixels = np.empty((len(split), 3, *sides(image_size)), np.uint8)
    outcomes: list[Outcome] = []
    kept = 0
    for outcome, array in decode_rows(split, still(image_size, fit, values, wide), every):
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
    see: Decode = partial(decode_rows, split, None)
    if image_size is not None:
        square = isinstance(image_size, int) and fit == "crop"
        kind = f"{image_size} square" if square else f"{size_text(image_size)} {fit}"
        need = _check_memory(len(split), image_size)
        see = partial(decode_rows, split, still(image_size, fit, values, wide))
    elif name == TRAIN:  # what fails later is replaced in training; a score must be over all that it says
        kind, see = "headers", partial(look_at_headers, split)
    if image_size is None:
        see = partial(_known_first, split, see)
    folder = cache_folder()
    if folder is not None and shutil.disk_usage(folder).free > need:
        with contextlib.suppress(OSError):
            store = _store(folder, source, name, kind, see, None if image_size is None else values)
            whole = image_size is not None and len(store) == int(store.readable.sum())
            pixels = store.stacked((3, *sides(image_size))) if whole and image_size is not None else None
            return replace(_from_store(split, store, pixels), fit=fit, values=values)
    if image_size is None:
        return _scanned(split, [outcome for outcome, _ in see(np.arange(len(split)))], None, fit, values)
    return scan_split(split, image_size, True, fit, values, wide)


def _known_first(split: Split, see: Decode, rows: Labels) -> Decoded:
    """What the source knows of pictures, and what `see` finds of the others."""
    facts = split.facts(rows)
    unknown = rows if facts is None else rows[facts["width"] == 0]
    found = iter(see(unknown) if len(unknown) else ())
    if facts is None:
        yield from found
        return
    for width, height, digest, content, span in facts[list(Seen._fields)].tolist():
        yield (Seen(width, height, digest, content, known_span(span)), None) if width else next(found)


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
        return decode_rows(split, keep, rows)

    try:
        store = _store(folder, source, name, f"{side} presized", decode, values)
    except OSError as error:
        raise UserError(f"presized images cannot be kept in '{folder}' ({error.strerror or error}); {remedy}") from None
    return replace(_from_store(split, store, presized=store), values=values)


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
    return sum(threaded(one, some)) * len(split) // len(some)
