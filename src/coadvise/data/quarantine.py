"""Files of a run's images that cannot be read: `quarantine.txt` in the run directory, and when they are too many."""

import fcntl
import re
from collections.abc import Mapping
from pathlib import Path

from coadvise.data.scan import ScannedSplit
from coadvise.errors import UserError
from coadvise.storage import write_text

FILE = "quarantine.txt"
_PATH = re.compile(r"""(['"])(?:\\.|(?!\1)[^\\])*\1""")


class Quarantine:
    """The training files that a run skipped, one line each: its path as Python writes it, and why.

    Every process of a run may add to the file, one at a time.

    Args:
        folder: the run directory.
        split: the scanned training images.
        most: the share of the training files that may be skipped.
    """

    def __init__(self, folder: Path, split: ScannedSplit, most: float) -> None:
        self.path, self.split, self.most = folder / FILE, split, most

    def begin(self) -> None:
        """Lists what the scan found, and keeps what the run skipped before and nobody has mended."""
        lines = list(self.split.unreadable)
        if self.path.exists():
            now = {_key(line) for line in lines} | {repr(str(path)) for path in self.split.paths}
            lines += [line for line in self._lines() if _key(line) not in now]
        if lines or self.path.exists():
            write_text(self.path, "".join(f"{line}\n" for line in lines))

    def add(self, unreadable: Mapping[int, str]) -> list[str]:
        """Lists files that could not be read while training; returns the lines that are new.

        Args:
            unreadable: a line a file, by its place in the split.

        Raises:
            UserError: there are more than the share now.
        """
        if not unreadable:
            return []
        with self.path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = {_key(line) for line in self._lines()}
            fresh = [line for line in unreadable.values() if _key(line) not in known]
            file.write("".join(f"{line}\n" for line in fresh))
        if fresh:
            files = len(self.split) + len(self.split.unreadable)
            check_share("training", len(known) + len(fresh), files, self.most, fresh[0])
        return fresh

    def count(self) -> int:
        """How many files are listed, by all processes."""
        return len(self._lines()) if self.path.exists() else 0

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines()


def check_share(what: str, unreadable: int, files: int, most: float, fault: str) -> None:
    """Raises UserError where more than the share `most` of the files cannot be read; `fault` is one of them."""
    if unreadable > most * files:
        raise UserError(
            f"{unreadable} of {files} {what} images cannot be read, data.max_unreadable={most:g} allows {most:.0%}; "
            f"for instance {fault}; mend or remove them, or allow more"
        )


def _key(line: str) -> str:
    """The path that a line begins with, as Python writes it."""
    found = _PATH.match(line)
    return found.group() if found else line
