"""Pictures of a run that cannot be read: `quarantine.txt` in the run directory, and the limit on their number."""

import re
from collections.abc import Mapping
from pathlib import Path

from coadvise.data.scanned import ScannedSplit
from coadvise.errors import UserError
from coadvise.machine import lock
from coadvise.storage import write_text

FILE = "quarantine.txt"
_NAME = re.compile(r"""(['"])(?:\\.|(?!\1)[^\\])*\1""")


class Quarantine:
    """The training pictures that a run skipped, a line each: the name as Python writes it, and why.

    Every process of a run may add to the file; a lock makes them wait for each other.

    Args:
        folder: the run directory.
        split: the scanned training images.
        most: the share of the training pictures that may be skipped.
    """

    def __init__(self, folder: Path, split: ScannedSplit, most: float) -> None:
        self.path, self.split, self.most = folder / FILE, split, most

    def begin(self) -> None:
        """Lists what the scan found, and keeps earlier lines whose pictures are still missing."""
        lines = list(self.split.unreadable)
        if self.path.exists():
            now = {_key(line) for line in lines} | {repr(name) for name in self.split.split.names()}
            lines += [line for line in self._lines() if _key(line) not in now]
        if lines or self.path.exists():
            write_text(self.path, "".join(f"{line}\n" for line in lines))

    def add(self, unreadable: Mapping[int, str]) -> list[str]:
        """Lists pictures that could not be read while training; returns the new lines.

        Args:
            unreadable: a line for each picture, by its row in the split.

        Raises:
            UserError: more than the allowed share is listed now.
        """
        if not unreadable:
            return []
        with self.path.open("a+") as file:
            lock(file)
            known = {_key(line) for line in self._lines()}
            fresh = [line for line in unreadable.values() if _key(line) not in known]
            file.write("".join(f"{line}\n" for line in fresh))
        if fresh:
            pictures = len(self.split) + len(self.split.unreadable)
            check_share("training", len(known) + len(fresh), pictures, self.most, fresh[0])
        return fresh

    def count(self) -> int:
        """How many pictures are listed, by all processes."""
        return len(self._lines()) if self.path.exists() else 0

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines()


def check_share(what: str, unreadable: int, pictures: int, most: float, fault: str) -> None:
    """Raises UserError if more than the share `most` of the pictures cannot be read; `fault` is the line of one."""
    if unreadable > most * pictures:
        raise UserError(
            f"{unreadable} of {pictures} {what} images cannot be read, data.max_unreadable={most:g} allows {most:.0%}; "
            f"for example {fault}; repair or remove them, or allow more"
        )


def _key(line: str) -> str:
    """The name that a line begins with, as Python writes it."""
    found = _NAME.match(line)
    return found.group() if found else line
