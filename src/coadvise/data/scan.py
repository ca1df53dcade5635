"""Reads every image once before training: what is there, what cannot be read and, where they are kept, the pixels."""

import contextlib
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from coadvise.data.images import Pixels, UnreadableImageError, read_image, square, to_array
from coadvise.data.sources import Source, Split
from coadvise.data.store import Outcome, Store, fingerprint, open_store, presized, presized_size
from coadvise.errors import UserError
from coadvise.machine import cache_folder

T = TypeVar("T")
Make = Callable[[Image.Image], Pixels]  # what is kept of an image

MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images kept in memory
MANY_FILES = 100_000  # whose contents are not compared: it would take minutes


@dataclass(frozen=True)
class ScannedSplit:
    """The readable images of a split.

    Attributes:
        paths, labels: the readable files, in the source's order; `labels` is [N] int64.
        pixels: [N, 3, S, S] uint8, or None where images stay on disk.
        presized: the images of `paths`, decoded and no larger than is needed, or None where files are decoded anew.
        unreadable: one line a file that could not be decoded: its path and why.
        sizes: how many images there are of each (width, height).
    """

    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]
    pixels: Pixels | None
    unreadable: tuple[str, ...]
    sizes: Counter[tuple[int, int]]
    presized: Store | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def per_class(self, classes: int) -> list[int]:
        return np.bincount(self.labels, minlength=classes).tolist()

    @cached_property
    def sha256(self) -> str:
        """Of the files' contents, in order: what they are called has no say in any view. Raises UserError."""
        whole = hashlib.sha256()
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, len(self), 4096):
                for digest in pool.map(_sha256, self.paths[start : start + 4096]):
                    whole.update(digest)
        return whole.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """An scanned source: all that training and evaluation need to know about the data."""

    source: Source
    train: ScannedSplit
    val: ScannedSplit

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes


def scan(
    source: Source, image_size: int, in_memory: bool, presize: int = 0, say: Callable[[str], None] = lambda text: None
) -> Dataset:
    """Decodes every image once, in threads, or takes what an earlier run or another process has kept of it.

    Args:
        in_memory: all images are wanted as `pixels`; processes share them.
        presize: shorter side, in pixels, of the training images to be kept in the user's cache folder; 0 keeps none.
        say: is told what is about to be written there.

    Raises:
        UserError: a class has no readable image left to train on, nothing is left to score, the pixels do not fit into
            memory, or the presized images not onto the disk.
    """
    if in_memory:
        train, val = (_shared_split(source, name, image_size) for name in ("train", "val"))
    else:
        val = scan_split(source.val, image_size, in_memory)
        train = (
            presized_split(source, "train", presize, cache_folder(), say)
            if presize
            else scan_split(source.train, image_size, False)
        )
    for label, count in enumerate(train.per_class(len(source.classes))):
        if count == 0:
            path = source.train.paths[source.train.labels.index(label)]
            fault = next(line for line in train.unreadable if line.startswith(repr(str(path))))
            raise UserError(f"class '{source.classes[label]}' has no readable image to train on; first fault: {fault}")
    if not len(val):
        raise UserError(f"no readable image to score on in '{source.root}'; first fault: {val.unreadable[0]}")
    return Dataset(source, train, val)


def scan_split(split: Split, image_size: int, in_memory: bool) -> ScannedSplit:
    """Decodes every image of a split; leaves out what cannot be read, and says which. Nothing is kept on disk."""
    if not in_memory:
        return _scanned(split, [outcome for outcome, _ in _decode(split, None)])
    _check_memory(len(split), image_size)
    pixels = np.empty((len(split), 3, image_size, image_size), np.uint8)
    outcomes: list[Outcome] = []
    kept = 0
    for outcome, array in _decode(split, partial(_square, size=image_size)):
        outcomes.append(outcome)
        if array is not None:
            pixels[kept] = array
            kept += 1
    return _scanned(split, outcomes, pixels[:kept])


def _shared_split(source: Source, name: str, image_size: int) -> ScannedSplit:
    """Pixels for memory, decoded once for all processes and runs; where they cannot be kept, for this process alone."""
    split: Split = getattr(source, name)
    _check_memory(len(split), image_size)
    folder = cache_folder()
    if folder is not None and shutil.disk_usage(folder).free > len(split) * 3 * image_size**2:
        with contextlib.suppress(OSError):
            store = _store(folder, source, name, f"{image_size} square", partial(_square, size=image_size))
            return _scanned(split, store.outcomes, pixels=store.stacked((3, image_size, image_size)))
    return scan_split(split, image_size, in_memory=True)


def presized_split(
    source: Source, name: str, side: int, folder: Path | None, say: Callable[[str], None]
) -> ScannedSplit:
    """Images with a shorter side of at most `side` pixels, in a file. Raises UserError where there is no room."""
    split: Split = getattr(source, name)
    remedy = "set XDG_CACHE_HOME to a folder on a larger disk, or data.presize=0 to decode files anew for every view"
    if folder is None:
        raise UserError(f"there is no folder for presized images, ~/.cache/coadvise cannot be written; {remedy}")

    def announce() -> None:
        need, free = _presized_bytes(split, side), shutil.disk_usage(folder).free
        room = f"{need / 2**30:.2f} GiB in '{folder}', where {free / 2**30:.2f} GiB are free"
        if need > free:
            raise UserError(f"{len(split)} presized images ({side} px) need {room}; {remedy}")
        say(f"presizing {len(split)} images to {side} px, once: {room}")

    try:
        store = _store(folder, source, name, f"{side} presized", partial(presized, side=side), announce)
    except OSError as error:
        raise UserError(f"presized images cannot be kept in '{folder}' ({error.strerror or error}); {remedy}") from None
    return _scanned(split, store.outcomes, presized=store)


def _store(
    folder: Path, source: Source, name: str, kind: str, make: Make, announce: Callable[[], None] = lambda: None
) -> Store:
    """The store of a split, one for each data folder, choice of its classes, way of dividing it, and kind."""
    split: Split = getattr(source, name)
    what = repr((os.fspath(source.root.absolute()), source.classes, source.note, kind))
    place = hashlib.sha256(what.encode()).hexdigest()[:12]

    def decode() -> Iterator[tuple[Outcome, Pixels | None]]:
        announce()
        return _decode(split, make)

    return open_store(
        folder / "images" / f"{name}-{kind.replace(' ', '-')}-{place}", fingerprint(split.paths, kind), decode
    )


def scored_and_trained_on(dataset: Dataset) -> list[tuple[Path, Path]]:
    """Validation files that are training files too, byte for byte: the one and the other. Not looked for among many."""
    train, val = dataset.train.paths, dataset.val.paths
    if len(train) + len(val) > MANY_FILES:
        return []
    by_size: dict[int, list[Path]] = {}
    for path in train:
        by_size.setdefault(path.stat().st_size, []).append(path)
    alike = [path for path in val if path.stat().st_size in by_size]
    others = [path for size in sorted({path.stat().st_size for path in alike}) for path in by_size[size]]
    by_content = dict(zip(_threaded(_sha256, others), others, strict=True))
    digests = zip(alike, _threaded(_sha256, alike), strict=True)
    return [(path, by_content[digest]) for path, digest in digests if digest in by_content]


def _check_memory(images: int, image_size: int) -> None:
    need = images * 3 * image_size**2
    if need > MEMORY_LIMIT:
        raise UserError(
            f"{images} images at {image_size} px need {need / 2**30:.1f} GiB decoded, and at most "
            f"{MEMORY_LIMIT / 2**30:.0f} GiB are kept in memory; use augment.kind=deit, which reads files as needed"
        )


def _sha256(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"cannot read '{path}' any more: {error.strerror}; restore it, or start again") from None


def _scanned(
    split: Split, outcomes: Sequence[Outcome], pixels: Pixels | None = None, presized: Store | None = None
) -> ScannedSplit:
    kept = [number for number, outcome in enumerate(outcomes) if not isinstance(outcome, str)]
    return ScannedSplit(
        paths=tuple(split.paths[number] for number in kept),
        labels=np.asarray(split.labels, np.int64)[kept],
        pixels=pixels,
        unreadable=tuple(outcome for outcome in outcomes if isinstance(outcome, str)),
        sizes=Counter(outcome for outcome in outcomes if not isinstance(outcome, str)),
        presized=presized,
    )


def _square(image: Image.Image, size: int) -> Pixels:
    return to_array(square(image, size))


def _presized_bytes(split: Split, side: int) -> int:
    """What the presized images will take, by the files' headers."""

    def one(path: Path) -> int:
        try:
            with Image.open(path) as image:
                width, height = presized_size(image.size, side)
        except Exception:  # whatever is wrong with it, the scan names it
            return 0
        return 3 * width * height

    return sum(_threaded(one, split.paths))


def _decode(split: Split, make: Make | None) -> Iterator[tuple[Outcome, Pixels | None]]:
    def one(path: Path) -> tuple[Outcome, Pixels | None]:
        try:
            image = read_image(path)
        except UnreadableImageError as error:
            return str(error), None
        return image.size, make(image) if make else None

    return _threaded(one, split.paths)


def _threaded(one: Callable[[Path], T], paths: Sequence[Path]) -> Iterator[T]:
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), 512):  # in slices, so that results do not pile up
            yield from pool.map(one, paths[start : start + 512])
