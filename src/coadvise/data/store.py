"""What decoding a split once found, kept in the user's cache folder for all processes and runs.

A store is a folder with `FINGERPRINT.json`, which holds each picture's size and digest or why it cannot be read, and
`FINGERPRINT.pixels`, decoded images one after the other in a memory-mapped file (empty where only the former is kept).
The JSON file is renamed into place last. The fingerprint is a hash of every picture's name and stamp (for a file its
size, times, inode and mode), of the code that decodes, and of Pillow's version: if any of these changes, the store is
made again, and the old one is deleted unless a process uses it. Each time a store is opened its pixels are compared
with their sha256; a damaged store is made again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from coadvise.data import images
from coadvise.data.images import Pixels, Values
from coadvise.data.sources import Split
from coadvise.machine import available_cores

FORMAT = 2
_BLOCK = 64 * 2**20  # bytes hashed at a time, by one thread


class Seen(NamedTuple):
    """A picture that could be decoded: its size in pixels, and the first 16 hexadecimal digits of its bytes' sha256.

    `span` is the smallest and largest value of a picture of more than 8 bits.
    """

    width: int
    height: int
    digest: str
    span: Values | None = None


Outcome = str | Seen  # of a picture; a text is why it cannot be read
Decoded = Iterable[tuple[Outcome, Pixels | None]]  # with what is kept of it, if anything


@dataclass(frozen=True)
class Store:
    """What was found of a split, and what was kept of its readable pictures: uint8 arrays of three dimensions.

    Pickles as its path, without its pixels.

    Attributes:
        path: the file of pixels.
        outcomes: one for each picture of the split, unreadable ones included.
        shapes: [N, 3], of each array; N is 0 where no pixels are kept.
    """

    path: Path
    outcomes: tuple[Outcome, ...]
    shapes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row: int) -> Pixels:
        """One array; a view of the file."""
        start, stop = self._ends[row : row + 2]
        return self._mapped[start:stop].reshape(self.shapes[row])

    def stacked(self, shape: tuple[int, int, int]) -> Pixels:
        """All arrays [N, *shape], as a view of the file; they must be of that one shape."""
        assert (self.shapes == shape).all(), "images of several shapes cannot be stacked"
        return self._mapped.reshape(len(self), *shape)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1))]).astype(np.int64)

    @cached_property
    def _mapped(self) -> Pixels:
        if not len(self):
            return np.empty(0, np.uint8)
        # Copy on write: nothing writes, but PyTorch warns of arrays that are read-only.
        return np.asarray(np.memmap(self.path, np.uint8, mode="c"))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "outcomes": self.outcomes, "shapes": self.shapes}


def fingerprint(split: Split, kind: str) -> str:
    """Of all that decides what a store holds; `kind` says what is kept of an image."""
    codecs = [f"{name} {features.version(name)}" for name in ("pil", "jpg", "libjpeg_turbo", "zlib", "webp", "libtiff")]
    code = [Path(module).read_text() for module in (images.__file__, __file__)]
    whole = hashlib.sha256(json.dumps([FORMAT, kind, codecs, code]).encode())
    for index in range(len(split)):
        whole.update(f"{split.name(index)}\0{split.stamp(index)}\0".encode())
    return whole.hexdigest()[:32]


def open_store(folder: Path, name: str, decode: Callable[[], Decoded]) -> Store:
    """The store with a fingerprint, made first unless a whole one exists. Other processes wait meanwhile.

    Args:
        name: the fingerprint.
        decode: called if the store has to be made; yields one item for each picture of the split, in order.

    Raises:
        OSError: it cannot be written or read; nothing half-written is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if (store := _read(folder, name)) is not None:  # several processes may read at the same time
            return store
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (store := _read(folder, name)) is not None:
            return store
        pixels, about = folder / f".{name}.pixels", folder / f".{name}.json"
        try:
            about.write_text(json.dumps(_write(pixels, decode())))
            for path in (pixels, about):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            for path in (pixels, about):
                path.rename(folder / path.name[1:])
        finally:
            pixels.unlink(missing_ok=True)
            about.unlink(missing_ok=True)
        for path in folder.iterdir():  # of other fingerprints
            if path.name not in (".lock", f"{name}.pixels", f"{name}.json") and not _in_use(
                path.with_suffix(".pixels")
            ):
                path.unlink(missing_ok=True)
        store = _read(folder, name)
        if store is None:
            raise OSError(f"what was written to '{folder}' does not read back as it was")
        return store


def presized(image: Image.Image, side: int) -> Pixels:
    """[H, W, 3]: shorter side resized to `side` (bicubic); a smaller image as it is."""
    return np.asarray(image.resize(presized_size(image.size, side), Image.Resampling.BICUBIC), np.uint8)


def presized_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height after `presized`."""
    scale = min(1.0, side / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _write(path: Path, decoded: Decoded) -> dict[str, Any]:
    outcomes: list[Outcome] = []
    shapes: list[tuple[int, ...]] = []
    with path.open("wb") as file:
        for outcome, array in decoded:
            outcomes.append(outcome)
            if array is not None:
                shapes.append(array.shape)
                file.write(np.ascontiguousarray(array).data)
    return {"format": FORMAT, "outcomes": outcomes, "shapes": shapes, "sha256": _digests(path)}


def _read(folder: Path, name: str) -> Store | None:
    """A store that is whole, or None."""
    path = folder / f"{name}.pixels"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads((folder / f"{name}.json").read_text())
        shapes = np.array(about["shapes"], np.int64).reshape(-1, 3)
        whole = path.stat().st_size == shapes.prod(axis=1).sum() and _digests(path) == about["sha256"]
        if about["format"] == FORMAT and whole:
            outcomes = tuple(outcome if isinstance(outcome, str) else Seen(*outcome) for outcome in about["outcomes"])
            store, held = Store(path, outcomes, shapes), os.open(path, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_SH)  # until it is released no process deletes the file
            weakref.finalize(store, os.close, held)
            return store
    return None


def _in_use(pixels: Path) -> bool:
    """Whether a process has this store open; it, or a process that it started, may map the pixels at any time."""
    with contextlib.suppress(FileNotFoundError), pixels.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _digests(path: Path) -> list[str]:
    """sha256 of each block of a file."""

    def one(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(_BLOCK)).hexdigest()

    with ThreadPoolExecutor(min(4, available_cores())) as pool:
        return list(pool.map(one, range(0, path.stat().st_size, _BLOCK)))
