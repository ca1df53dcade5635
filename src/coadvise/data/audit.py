"""Reads every image once before training: what is there, what cannot be read and, for small sets, the pixels."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coadvise.data.images import Pixels, UnreadableImageError, read_image, square, to_array
from coadvise.data.sources import Source, Split
from coadvise.errors import UserError

MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images kept in memory


@dataclass(frozen=True)
class AuditedSplit:
    """The readable images of a split.

    Attributes:
        paths, labels: the readable files, in the source's order; `labels` is [N] int64.
        pixels: [N, 3, S, S] uint8, or None where images stay on disk.
        unreadable: one line a file that could not be decoded: its path and why.
        sizes: how many images there are of each (width, height).
    """

    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]
    pixels: Pixels | None
    unreadable: tuple[str, ...]
    sizes: Counter[tuple[int, int]]

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
    """An audited source: all that training and evaluation need to know about the data."""

    source: Source
    train: AuditedSplit
    val: AuditedSplit

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes


def audit(source: Source, image_size: int, in_memory: bool) -> Dataset:
    """Decodes every image once, in threads.

    Raises:
        UserError: a class has no readable image left to train on, nothing is left to score, or the pixels do not fit.
    """
    train = audit_split(source.train, image_size, in_memory)
    val = audit_split(source.val, image_size, in_memory)
    for label, count in enumerate(train.per_class(len(source.classes))):
        if count == 0:
            path = source.train.paths[source.train.labels.index(label)]
            fault = next(line for line in train.unreadable if line.startswith(repr(str(path))))
            raise UserError(f"class '{source.classes[label]}' has no readable image to train on; first fault: {fault}")
    if not len(val):
        raise UserError(f"no readable image to score on in '{source.root}'; first fault: {val.unreadable[0]}")
    return Dataset(source, train, val)


def audit_split(split: Split, image_size: int, in_memory: bool) -> AuditedSplit:
    """Decodes every image of a split; leaves out what cannot be read, and says which."""
    need = len(split) * 3 * image_size**2
    if in_memory and need > MEMORY_LIMIT:
        raise UserError(
            f"{len(split)} images at {image_size} px need {need / 2**30:.1f} GiB decoded, and at most "
            f"{MEMORY_LIMIT / 2**30:.0f} GiB are kept in memory; use augment.kind=deit, which reads files as needed"
        )
    pixels = np.empty((len(split), 3, image_size, image_size), np.uint8) if in_memory else None
    unreadable: list[str] = []
    kept: list[int] = []
    sizes: Counter[tuple[int, int]] = Counter()
    for number, outcome in enumerate(_decode(split, image_size, in_memory)):
        if isinstance(outcome, str):
            unreadable.append(outcome)
            continue
        size, array = outcome
        sizes[size] += 1
        if pixels is not None and array is not None:
            pixels[len(kept)] = array
        kept.append(number)
    labels = np.asarray(split.labels, np.int64)[kept]
    paths = tuple(split.paths[i] for i in kept)
    return AuditedSplit(paths, labels, None if pixels is None else pixels[: len(kept)], tuple(unreadable), sizes)


def _sha256(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"cannot read '{path}' any more: {error.strerror}; restore it, or start again") from None


def _decode(split: Split, image_size: int, keep: bool) -> Iterator[str | tuple[tuple[int, int], Pixels | None]]:
    def one(path: Path) -> str | tuple[tuple[int, int], Pixels | None]:
        try:
            image = read_image(path)
        except UnreadableImageError as error:
            return str(error)
        return image.size, to_array(square(image, image_size)) if keep else None

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(split), 4096):  # in slices, so that results do not pile up
            yield from pool.map(one, split.paths[start : start + 4096])
