"""What the scan found of a split, kept in the user's cache folder for all processes and runs.

A store is a folder with `FINGERPRINT.json`, `FINGERPRINT.table`, a row of numbers for each picture, and
`FINGERPRINT.pixels`, decoded images one after the other (empty where none are kept). The last two are mapped into
memory, which processes share. The JSON file is renamed into place last. The fingerprint is a hash of every picture's
name and stamp (for a file its size, times, inode and mode), of the code that decodes, and of Pillow's version. If some
pictures changed, a new store is made: the others' rows come from the old one, which is deleted unless a process uses
it. Each time a store is opened it is compared with its sha256; a damaged store is made again. So are the rows of
pictures that could not be read, where a disk or server that did not answer may do so now.
"""

import contextlib
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from coadvise.data import images
from coadvise.data.images import Pixels, Values
from coadvise.data.sources.split import Keys
from coadvise.machine import available_cores, lock

FORMAT = 4
_BLOCK = 64 * 2**20  # bytes hashed at a time, by one thread
_ROW = np.dtype([
    ("key", "<u8"), ("width", "<i4"), ("height", "<i4"), ("digest", "<u8"), ("content", "<u8"), ("span", "<f8", (2,)),
    ("shape", "<i4", (3,)),
])  # fmt: skip
_ENDINGS = (".pixels", ".table", ".json")  # in the order in which they are renamed into place


class Seen(NamedTuple):
    """A picture that can be read: its size in pixels, and the first 64 bits of two sha256.

    Attributes:
        digest: see `images.digest_of`.
        content: of all its bytes; 0 if not all were read.
        span: the smallest and largest value of a picture of more than 8 bits.
    """

    width: int
    height: int
    digest: int
    content: int = 0
    span: Values | None = None


class UnreadNow(str):
    """Why a picture could not be read, where another attempt may succeed."""


Outcome = str | Seen  # of a picture; a text is why it cannot be read
Decoded = Iterable[tuple[Outcome, Pixels | None]]  # with what is kept of it, if anything
Decode = Callable[[npt.NDArray[np.int64]], Decoded]  # of some rows of a split, in this order


@dataclass(frozen=True)
class Store:
    """What was found of a split, and what was kept of its readable pictures: uint8 arrays of three dimensions.

    Pickles as its path, without its table and pixels.

    Attributes:
        path: the file of pixels.
        faults: why pictures cannot be read, by their row in the split.
        again: whether some of these are worth another attempt.
    """

    path: Path
    faults: dict[int, str]
    again: bool = False

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, row: int) -> Pixels:
        """One array, counted over the readable pictures; a view of the file."""
        start, stop = self._ends[row : row + 2]
        return self._mapped[start:stop].reshape(self._shapes[row])

    def stacked(self, shape: tuple[int, int, int]) -> Pixels:
        """All arrays [N, *shape], as a view of the file; they must be of that one shape."""
        assert (self._shapes == shape).all(), "images of several shapes cannot be stacked"
        return self._mapped.reshape(len(self), *shape)

    @cached_property
    def table(self) -> npt.NDArray[np.void]:
        """[N], a row for each picture, with the fields of `Seen`; of unreadable ones only the key counts."""
        return _map(self.path.with_suffix(".table"), _ROW)

    def seen(self, row: int) -> Seen:
        """What was found of a readable picture, by its row in the split."""
        found = self.table[row]
        width, height, digest, content = (int(found[field]) for field in Seen._fields[:4])
        return Seen(width, height, digest, content, known_span(found["span"].tolist()))

    @cached_property
    def readable(self) -> npt.NDArray[np.bool_]:
        """[N], which pictures can be read."""
        good = np.ones(len(self.table), bool)
        good[list(self.faults)] = False
        return good

    @cached_property
    def _shapes(self) -> npt.NDArray[np.int64]:
        shapes = self.table["shape"]
        return shapes[shapes[:, 0] > 0].astype(np.int64)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self._shapes.prod(axis=1, dtype=np.int64))])

    @cached_property
    def _mapped(self) -> Pixels:
        return _map(self.path, np.dtype(np.uint8))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "faults": self.faults, "again": self.again}

    def contents(self, find: Callable[[list[int]], Iterable[int]]) -> Keys:
        """`Seen.content` of every readable picture; those that were not known are kept from now on.

        Args:
            find: gives those of some readable pictures, counted from 0.
        """
        known, kept = self.table["content"][self.readable], self.path.with_suffix(".contents")
        with contextlib.suppress(OSError):
            earlier = np.fromfile(kept, "<u8")
            if len(earlier) == len(known) + 1 and earlier[-1] == _sum(earlier[:-1]):
                known = earlier[:-1]
        if len(missing := np.flatnonzero(known == 0)):
            known[missing] = np.fromiter(find(missing.tolist()), np.uint64, len(missing))
            beside = kept.with_name(f".{kept.name}.{os.getpid()}")
            with contextlib.suppress(OSError):
                np.append(known, _sum(known)).tofile(beside)
                beside.rename(kept)
        return known


def known_span(span: Sequence[float]) -> Values | None:
    """A span as it is in a table, where NaN stands for none."""
    low, high = span
    return None if low != low else (low, high)


def fingerprint(keys: Keys, kind: str) -> str:
    """Of all that decides what a store holds.

    Args:
        keys: of the split.
        kind: what is kept of an image.
    """
    return hashlib.sha256(_maker(kind).encode() + keys.astype("<u8").tobytes()).hexdigest()[:32]


def _maker(kind: str) -> str:
    """What decodes, and how."""
    codecs = [f"{name} {features.version(name)}" for name in ("pil", "jpg", "libjpeg_turbo", "zlib", "webp", "libtiff")]
    codecs.append(f"heif {version('pillow-heif') if images.HEIF else None}")
    code = [Path(module).read_text() for module in (images.__file__, __file__)]
    return hashlib.sha256(json.dumps([FORMAT, kind, codecs, code]).encode()).hexdigest()


def open_store(folder: Path, keys: Keys, kind: str, decode: Decode) -> Store:
    """The store of pictures, made first unless a whole one exists. Other processes wait meanwhile.

    Args:
        keys: [N] of the pictures.
        kind: what is kept of an image; all stores of a folder are of one.
        decode: called with the rows that no older store knows, if there are any.

    Raises:
        OSError: it cannot be written or read; nothing half-written is left.
    """
    name = fingerprint(keys, kind)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        lock(file, shared=True)
        store = _read(folder, name)  # several processes may read at the same time
        if store is None or store.again:
            lock(file)
            store = _read(folder, name)
        if store is not None and not store.again:
            return store
        try:
            _write(folder, name, keys, _maker(kind), decode)
        finally:
            for ending in _ENDINGS:
                (folder / f".{name}{ending}").unlink(missing_ok=True)
        for path in folder.iterdir():  # of other fingerprints
            if path.name != ".lock" and path.stem != name and not _in_use(path.with_suffix(".pixels")):
                path.unlink(missing_ok=True)
        store = _read(folder, name)
        if store is None:
            raise OSError(f"what was written to '{folder}' does not read back as it was")
        return store


def table_bytes(pictures: int) -> int:
    """The size of a store's table."""
    return pictures * _ROW.itemsize


def presized(image: Image.Image, side: int) -> Pixels:
    """[H, W, 3]: shorter side resized to `side` (bicubic); a smaller image as it is."""
    return np.asarray(image.resize(presized_size(image.size, side), Image.Resampling.BICUBIC), np.uint8)


def presized_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height after `presized`."""
    scale = min(1.0, side / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _write(folder: Path, name: str, keys: Keys, maker: str, decode: Decode) -> None:
    pixels, table_file, about = (folder / f".{name}{ending}" for ending in _ENDINGS)
    table = np.zeros(len(keys), _ROW)
    table["key"] = keys
    faults: dict[int, str] = {}
    with pixels.open("wb") as file:
        for row, (outcome, array) in enumerate(_outcomes(keys, _older(folder, maker), decode)):
            if isinstance(outcome, str):
                faults[row] = outcome
            else:
                shape = (0, 0, 0) if array is None else array.shape
                table[row] = keys[row], *outcome[:4], outcome.span or (np.nan, np.nan), shape
            if array is not None:
                file.write(np.ascontiguousarray(array).data)
    table.tofile(table_file)
    again = any(isinstance(fault, UnreadNow) for fault in faults.values())
    sums = [*map(_digests, (pixels, table_file))]
    about.write_text(json.dumps({"format": FORMAT, "maker": maker, "faults": faults, "again": again, "sha256": sums}))
    for ending in _ENDINGS:
        with (folder / f".{name}{ending}").open("rb") as written:
            os.fsync(written.fileno())
    for ending in _ENDINGS:
        (folder / f".{name}{ending}").rename(folder / f"{name}{ending}")


def _outcomes(keys: Keys, old: Store | None, decode: Decode) -> Iterator[tuple[Outcome, Pixels | None]]:
    """Of all pictures, in order: from an older store where it knows them."""
    if old is None or not len(old.table):
        yield from decode(np.arange(len(keys)))
        return
    known = old.table["key"]
    order = np.argsort(known)
    place = order[np.minimum(np.searchsorted(known, keys, sorter=order), len(known) - 1)]
    hit = (known[place] == keys) & old.readable[place]
    kept = old.table["shape"][:, 0] > 0
    number = np.cumsum(kept) - 1
    missing = np.flatnonzero(~hit)
    fresh = iter(decode(missing) if len(missing) else ())
    for at, there in zip(place.tolist(), hit.tolist(), strict=True):
        if not there:
            yield next(fresh)
            continue
        yield old.seen(at), old[number[at]] if kept[at] else None


def _older(folder: Path, maker: str) -> Store | None:
    """The newest whole store that the same code made."""
    for about in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(about.read_text())["maker"] == maker and (store := _read(folder, about.stem)) is not None:
                return store
    return None


def _read(folder: Path, name: str) -> Store | None:
    """A store that is whole, or None."""
    pixels, table, about = (folder / f"{name}{ending}" for ending in _ENDINGS)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(about.read_text())
        if found["format"] == FORMAT and found["sha256"] == [*map(_digests, (pixels, table))]:
            store = Store(pixels, {int(row): fault for row, fault in found["faults"].items()}, found["again"])
            held = os.open(pixels, os.O_RDONLY)
            lock(held, shared=True)  # until it is released no process deletes the file
            weakref.finalize(store, os.close, held)
            return store
    return None


def _map(path: Path, kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """A file's content, mapped into memory."""
    if not path.stat().st_size:
        return np.empty(0, kind)
    # Copy on write: nothing writes, but PyTorch warns of arrays that are read-only.
    return np.asarray(np.memmap(path, kind, mode="c"))


def _in_use(pixels: Path) -> bool:
    """Whether a process has this store open; it, or a process that it started, may map the pixels at any time."""
    with contextlib.suppress(FileNotFoundError), pixels.open("rb") as file:
        try:
            lock(file, wait=False)
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


def _sum(values: Keys) -> np.uint64:
    return np.uint64(images.first_bits(values.tobytes()))
