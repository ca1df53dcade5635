"""The run's record: `metrics.jsonl`, one JSON object a line, the only source of the numbers in its report."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coadvise.errors import UserError
from coadvise.machine import lock
from coadvise.storage import storing, write_text

FILE = "metrics.jsonl"
REWIND = "rewind"  # a kind that is passed on and never written
Follower = Callable[[dict[str, Any]], None]  # gets one record


class Recorder:
    """Appends records. Every process may call it; one of them writes.

    Args:
        folder: the run directory.
        write: whether this process writes; only the first one does.
        say: gets messages for the user.
        followers: each gets every record too; more may be added to the list.
    """

    def __init__(
        self, folder: Path, write: bool, say: Callable[[str], None], followers: Sequence[Follower] = ()
    ) -> None:
        self.path, self.write, self.say, self.followers = folder / FILE, write, say, list(followers)
        if write and self.path.exists():
            with self._locked():
                if not self.path.read_bytes().endswith(b"\n"):  # a crash cut the last line
                    self._replace(read_records(folder))

    def add(self, kind: str, **values: Any) -> None:
        """Appends one record."""
        self.take({"kind": kind, **values})

    def take(self, record: dict[str, Any]) -> None:
        """Appends one record, or does what one of the kind `rewind` says, of a process that does not write."""
        if record["kind"] == REWIND:
            self.rewind(record["part"], record["step"])
            return
        if self.write:
            with self._locked(), storing(self.path), self.path.open("ab", buffering=0) as file:
                before, line = file.seek(0, os.SEEK_END), (json.dumps(record) + "\n").encode()
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError:  # the next record must not follow half of this one
                    file.truncate(before)
                    raise
        self.follow(record)

    def follow(self, record: dict[str, Any]) -> None:
        """Passes a record on that is written, here or by another process."""
        for follower in self.followers:
            follower(record)

    def take_missing(self, records: Iterable[dict[str, Any]]) -> None:
        """As `take` of each in order, but for those that are there already."""
        there = set(map(json.dumps, read_records(self.path.parent)))
        for record in records:
            if record["kind"] == REWIND:
                self.take(record)
                there = set(map(json.dumps, read_records(self.path.parent)))
            elif (line := json.dumps(record)) not in there:
                self.take(record)
                there.add(line)

    def rewind(self, part: str, step: int) -> None:
        """Removes what `part` recorded after `step`, its result and its exports: training will make them again."""
        if not self.write:
            self.follow({"kind": REWIND, "part": part, "step": step})
        elif self.path.exists():
            with self._locked():
                records = read_records(self.path.parent)
                self._replace(
                    r for r in records
                    if r.get("part") != part or (r.get("step", 0) <= step and r["kind"] not in ("result", "export"))
                )  # fmt: skip

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Networks that are trained at the same time write one at a time."""
        with storing(self.path):
            file = self.path.with_name(f".{FILE}.lock").open("w")
        with file:
            lock(file)
            yield

    def _replace(self, records: Iterable[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in order, without a last line that a crash cut short."""
    path = folder / FILE
    return list(_parse(path, path.read_bytes().splitlines())) if path.exists() else []


def last_of(records: Iterable[dict[str, Any]], kind: str, part: str | None = None) -> dict[str, Any] | None:
    """The last record of a kind (and of a part), or None."""
    found = [r for r in records if r["kind"] == kind and (part is None or r.get("part") == part)]
    return found[-1] if found else None


def _parse(path: Path, lines: list[bytes]) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "kind" in record:
            yield record
        elif number + 1 < len(lines):
            raise UserError(f"damaged record: {path}, line {number + 1} is not a record; restore or remove the line")
