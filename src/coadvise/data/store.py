"""Decoded images of a split in one memory-mapped file of the user's cache folder: made once, shared by all processes.

A store is a folder with `FINGERPRINT.pixels`, the images' bytes one after the other, and `FINGERPRINT.json`, which says
what they are and is renamed into place last. The fingerprint is a hash of every file's path, size, time of change and
mode, of the code that decodes them and of Pillow's version: with any of these another, the store is made anew, and the
old one dropped unless somebody has it. The pixels are held against their sha256 each time a store is opened; a damaged
one is made anew.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from coadvise.data import images
from coadvise.data.images import Pixels

Outcome = str | tuple[int, int]  # of a file: why it cannot be read, or its image's width and height
Decoded = Iterable[tuple[Outcome, Pixels | None]]  # an array where there is an image

FORMAT = 1
_BLOCK = 64 * 2**20  # bytes hashed at a time, by one thread


@dataclass(frozen=True)
class Store:
    """The images of a split that can be read, as uint8 arrays of three dimensions. Pickles as its path, not its pixels.

    Attributes:
        path: the file of pixels.
        outcomes: one for each file of the split, unreadable ones included.
        shapes: [N, 3], of each image.
    """

    path: Path
    outcomes: tuple[Outcome, ...]
    shapes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row: int) -> Pixels:
        """One image, as it lies in the file."""
        start, stop = self._ends[row : row + 2]
        return self._mapped[start:stop].reshape(self.shapes[row])

    def stacked(self, shape: tuple[int, int, int]) -> Pixels:
        """All images [N, *shape], as they lie in the file; they must be of that one shape."""
        assert (self.shapes == shape).all(), "images of several shapes cannot be stacked"
        return self._mapped.reshape(len(self), *shape)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1))]).astype(np.int64)

    @cached_property
    def _mapped(self) -> Pixels:
        if not len(self):
            return np.empty(0, np.uint8)
        # Copy on write: nobody means to write, but PyTorch takes arrays that could be written without complaint.
        return np.asarray(np.memmap(self.path, np.uint8, mode="c"))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "outcomes": self.outcomes, "shapes": self.shapes}


def fingerprint(paths: Sequence[Path], kind: str) -> str:
    """Of everything that decides the pixels of a store; `kind` says what is made of an image."""
    codecs = [f"{name} {features.version(name)}" for name in ("pil", "jpg", "libjpeg_turbo", "zlib", "webp", "libtiff")]
    code = [Path(module).read_text() for module in (images.__file__, __file__)]
    whole = hashlib.sha256(json.dumps([FORMAT, kind, codecs, code]).encode())
    for path in paths:
        try:
            about = path.stat()
            line = f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino} {about.st_mode}"
        except OSError as error:
            line = f"errno {error.errno}"
        whole.update(os.fsencode(path.absolute()) + b"\0" + line.encode() + b"\0")
    return whole.hexdigest()[:32]


def open_store(folder: Path, name: str, decode: Callable[[], Decoded]) -> Store:
    """The store of a fingerprint, made first where it is not there whole. Other processes wait meanwhile.

    Args:
        name: the fingerprint.
        decode: called if the store has to be made; an outcome a file and, where there is an image, its array.

    Raises:
        OSError: it cannot be written or read; what was written of it is gone again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if (store := _read(folder, name)) is not None:  # several processes may look at the same time
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
    """A store that is there and whole, or None."""
    path = folder / f"{name}.pixels"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads((folder / f"{name}.json").read_text())
        shapes = np.array(about["shapes"], np.int64).reshape(-1, 3)
        whole = path.stat().st_size == shapes.prod(axis=1).sum() and _digests(path) == about["sha256"]
        if about["format"] == FORMAT and whole:
            outcomes = tuple(o if isinstance(o, str) else (int(o[0]), int(o[1])) for o in about["outcomes"])
            store, held = Store(path, outcomes, shapes), os.open(path, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_SH)  # until it is let go nobody removes the file
            weakref.finalize(store, os.close, held)
            return store
    return None


def _in_use(pixels: Path) -> bool:
    """Whether a process has a store, whose pixels it, or one that it started, may map at any time."""
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

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, range(0, path.stat().st_size, _BLOCK)))
