"""Files from elsewhere on this node's disk: whole, verified by sha256, bounded, shared by all processes.

A file is called by its sha256, so sets share what they have in common and a changed one is another. It is written
beside, verified, synced and renamed. Where there is no room, the files that were not used for longest go. A deleted
file stays readable for who has it open.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from coadvise.data.shards.place import Beat, reason
from coadvise.errors import StorageError, UserError
from coadvise.machine import lock

BLOCK = 8 * 2**20  # bytes asked for at a time: a broken connection costs no more
Read = Callable[[int, int], bytes]  # of bytes start..stop-1; all bytes from a server that knows no ranges


class Kept(NamedTuple):
    """A file that is kept under its sha256 (in hex)."""

    name: str
    bytes: int
    sha256: str


class ChangedError(UserError):
    """A file is not what its index says; the message names it."""


def changed(where: str, file: Kept, what: str) -> ChangedError:
    return ChangedError(
        f"'{where}/{file.name}' is not what its index says ({what}): it was cut off or changed; write it again with "
        "'coadvise shard', which keeps what is whole"
    )


class FileCache:
    """A folder of kept files.

    Args:
        folder: which need not exist.
        most: bytes; the file that is asked for is kept in any case.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most

    def path(self, file: Kept) -> Path:
        return self.folder / file.sha256

    def open(self, file: Kept, where: str, read: Read, beat: Beat) -> IO[bytes]:
        """A file of the cache, fetched first unless it is there.

        Args:
            where: names the place in messages.
            read: gives its bytes; raises as `Place.read`.

        Raises:
            ChangedError: what comes is something else, also the second time.
            StorageError: it cannot be fetched, or not be kept.
        """
        while True:
            if (there := self.opened(file)) is not None:
                return there
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._fetch(file, where, read, beat)
            except OSError as error:
                raise StorageError(
                    f"'{where}/{file.name}' cannot be kept in '{self.folder}': {error.strerror or reason(error)}; make "
                    "room there, or set XDG_CACHE_HOME to a folder on a larger disk, and run the same command again"
                ) from None

    def opened(self, file: Kept) -> IO[bytes] | None:
        """A file of the cache, used just now; None if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            there = self.path(file).open("rb", buffering=0)
            self.used(file)
            return there
        return None

    def used(self, file: Kept) -> None:
        """Notes that a file is in use: others are deleted before it."""
        with contextlib.suppress(OSError):
            os.utime(self.path(file))

    def _fetch(self, file: Kept, where: str, read: Read, beat: Beat) -> None:
        """Returns when this or another process has fetched it, or may have: others delete what was left half-done."""
        part = self.folder / f"{file.sha256}.part"
        with part.open("ab") as writing:
            while not _locked(writing):  # another process fetches it
                beat()
                time.sleep(0.05)
            if self.path(file).exists() or not _is(writing, part):
                return
            try:
                while not self._made_room(file.bytes, part):  # others that are fetched fill it
                    beat()
                    time.sleep(0.05)
                for last in (False, True):
                    if (fault := _copied(file, where, read, part, beat)) is None:
                        break
                    if last:
                        raise changed(where, file, fault)
                with self._counted():
                    part.rename(self.path(file))
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Nobody else takes room or renames, so that every file is counted, and once."""
        with (self.folder / ".lock").open("a") as file:
            lock(file)
            yield

    def _made_room(self, need: int, part: Path) -> bool:
        """Deletes the files not used for longest until there is room, which is then taken.

        Returns whether it was: not if what others are fetching leaves none. They took room before, and need no more.
        """
        with self._counted():
            others = [path for path in self.folder.iterdir() if path not in (part, self.folder / ".lock")]
            parts = [path for path in others if path.suffix == ".part" and not _removed(path)]
            taken = sum(about.st_size for path in parts if (about := _about(path)) is not None)
            if taken and taken + need > self.most:
                return False
            whole = ((_about(path), path) for path in others if path.suffix != ".part")
            known = sorted((about.st_mtime_ns, about.st_size, path) for about, path in whole if about is not None)
            total = taken + need + sum(size for _, size, _ in known)
            for _, size, path in known:
                if total <= self.most:
                    break
                path.unlink(missing_ok=True)
                total -= size
            os.truncate(part, need)
            return True


def _copied(file: Kept, where: str, read: Read, part: Path, beat: Beat) -> str | None:
    """Writes a file's bytes and verifies them. Returns what is wrong with them."""
    digest, have = hashlib.sha256(), 0
    with part.open("r+b") as writing:
        while have < file.bytes:
            stop = min(have + BLOCK, file.bytes)
            try:
                content = read(have, stop)
            except (FileNotFoundError, PermissionError) as error:
                gone = "is gone" if isinstance(error, FileNotFoundError) else f"may not be read ({reason(error)})"
                raise StorageError(
                    f"'{where}/{file.name}' {gone}; once it can be read, run the same command again to go on"
                ) from None
            if len(content) > stop - have:
                content = content[have:]
            if not content:
                return f"{have} bytes, should be {file.bytes}"
            digest.update(content)
            have += writing.write(content)
            beat()
        writing.flush()
        os.fsync(writing.fileno())
    if have != file.bytes:
        return f"{have} bytes, should be {file.bytes}"
    return None if digest.hexdigest() == file.sha256 else "sha256 differs"


def _locked(file: IO[bytes]) -> bool:
    try:
        lock(file, wait=False)
    except BlockingIOError:
        return False
    return True


def _removed(part: Path) -> bool:
    """Removes what a process left that has died."""
    with contextlib.suppress(FileNotFoundError), part.open("rb") as file:
        if not _locked(file):
            return False
        part.unlink()
    return True


def _is(file: IO[bytes], path: Path) -> bool:
    about = _about(path)
    return about is not None and about.st_ino == os.fstat(file.fileno()).st_ino


def _about(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat()
    return None
