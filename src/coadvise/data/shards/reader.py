"""Reads files of a place by their index: a local one where it is, others through the cache on this node's disk."""

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from coadvise.data.shards.cache import FileCache, Kept, changed
from coadvise.data.shards.place import Beat, Place
from coadvise.errors import StorageError, UserError
from coadvise.machine import cache_folder

MOST_OPEN = 256  # files that a process keeps open
FETCHING = 4  # at a time, by one process


@dataclass(frozen=True)
class Files:
    """Some files of a place, by their index; pickles as what to read, without what is open.

    Attributes:
        most: bytes of the cache on this node's disk.
    """

    place: Place
    files: tuple[Kept, ...]
    most: int

    @property
    def reader(self) -> "Reader":
        """This process's own: connections and locks cannot be inherited."""
        found = self.__dict__.get("_reader")
        if found is None or found.process != os.getpid():
            found = self.__dict__["_reader"] = Reader(self)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_reader"}


class Reader:
    """What one process has open of some files. Its threads share it."""

    def __init__(self, files: Files) -> None:
        self.process = os.getpid()
        self.place, self.files, self._local = files.place, files.files, files.place.local
        folder = cache_folder()
        self._kept = None if folder is None else FileCache(folder / "shards", files.most)
        self._marks = None if folder is None else folder / "verified"
        self._open: OrderedDict[int, tuple[IO[bytes], bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._soon, self._queue = frozenset[int](), SimpleQueue[int]()

    @property
    def near(self) -> bool:
        """Whether the files are this machine's, and nothing is fetched."""
        return self._local is not None

    def bytes_of(self, number: int, offset: int, length: int) -> bytes | None:
        """Some bytes of a file that is open here; None if it is not. Raises ChangedError for one that is shorter."""
        if (opened := self._open.get(number)) is None:
            return None
        content = os.pread(opened[0].fileno(), length, offset)
        if len(content) != length:
            raise changed(self.place.url, self.files[number], "it is shorter")
        return content

    def open(self, numbers: Sequence[int], beat: Beat) -> None:
        """Opens whole and verified files, several at a time. Raises as `FileCache.open`."""
        self._drop_deleted()
        missing = [number for number in numbers if not self._still(number)]
        if len(missing) > 1 and not self.near:
            with ThreadPoolExecutor(FETCHING) as pool:
                for _ in pool.map(partial(self._opened, beat=beat), missing):
                    pass
        else:
            for number in missing:
                self._opened(number, beat)

    def open_soon(self, numbers: Sequence[int]) -> None:
        """Fetches files in the background, in this order. What fails there is met again by who needs the file."""
        if self.near or self._soon == (wanted := frozenset(numbers)):
            return
        self._drop_deleted()
        if not self._soon:
            for _ in range(FETCHING):  # threads that a program which ends does not wait for
                threading.Thread(target=self._fetch_queued, daemon=True).start()
        for number in numbers:
            if number not in self._soon:
                self._queue.put(number)
        self._soon = wanted

    def _fetch_queued(self) -> None:
        while True:
            number = self._queue.get()
            if number in self._soon:
                with contextlib.suppress(Exception):
                    self._opened(number, lambda: None)

    def ranged(self, number: int, offset: int, length: int) -> bytes:
        """Some bytes of a file that is not fetched for them. Raises StorageError."""
        file = self.files[number]
        try:
            content = self.place.read(file.name, offset, offset + length)
        except (FileNotFoundError, PermissionError):
            raise StorageError(
                f"'{self.place.url}/{file.name}' is gone or may not be read; once it can be, run the same command again"
            ) from None
        return content if len(content) <= length else content[offset : offset + length]

    def mapped(self, number: int, kind: np.dtype[Any]) -> npt.NDArray[Any]:
        """A file as an array, mapped into memory. Raises as `open`."""
        self.open([number], lambda: None)
        if not self.files[number].bytes:
            return np.empty(0, kind)
        return np.asarray(np.memmap(self._open[number][0], kind, "r"))

    def _drop_deleted(self) -> None:
        """Closes files that the cache has deleted, whose bytes the disk keeps until then; who reads has them too."""
        with self._lock:
            for number, (file, _) in [*self._open.items()]:
                if not os.fstat(file.fileno()).st_nlink:
                    del self._open[number]

    def _still(self, number: int) -> bool:
        """Whether a file is open, and is still there as it was."""
        if (opened := self._open.get(number)) is None:
            return False
        if self.near and _stamp(os.fstat(opened[0].fileno())) != opened[1]:
            with self._lock:
                self._open.pop(number, None)
            return False
        if self._kept is not None and not self.near:
            self._kept.used(self.files[number])
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
        return True

    def _opened(self, number: int, beat: Beat) -> None:
        if number in self._open:
            return
        file = self.files[number]
        if self._local is not None:
            opened = self._verified(self._local / file.name, file, beat)
        elif self._kept is None:
            raise UserError(
                f"there is no folder for what is fetched from '{self.place.url}', ~/.cache/coadvise cannot be written; "
                "set XDG_CACHE_HOME to one that can"
            )
        else:
            opened = self._kept.open(file, self.place.url, partial(self.place.read, file.name, beat=beat), beat)
        with self._lock:
            self._open[number] = opened, _stamp(os.fstat(opened.fileno()))
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)

    def _verified(self, path: Path, file: Kept, beat: Beat) -> IO[bytes]:
        """A local file, whose bytes are read once for this machine, and again when it may have changed."""
        try:
            opened = path.open("rb", buffering=0)
        except OSError as error:
            raise StorageError(
                f"'{path}' cannot be read: {error.strerror}; once it can be, run the same command again to go on"
            ) from None
        about = os.fstat(opened.fileno())
        mark = None if self._marks is None else self._marks / f"{file.sha256}-{_stamp(about).hex()}"
        if about.st_size != file.bytes:
            raise changed(self.place.url, file, f"{about.st_size} bytes, should be {file.bytes}")
        if mark is None or not mark.exists():
            digest = hashlib.sha256()
            while block := opened.read(2**24):
                digest.update(block)
                beat()
            if digest.hexdigest() != file.sha256:
                raise changed(self.place.url, file, "sha256 differs")
            _mark(mark)
        return opened


def _mark(path: Path | None) -> None:
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    except OSError:  # a later process verifies it again
        return


def _stamp(about: os.stat_result) -> bytes:
    """What differs when a file may have changed."""
    told = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev)
    return hashlib.blake2b(repr(told).encode(), digest_size=12).digest()
