"""Writes data as tar shards, by any number of processes: `coadvise shard`.

Which picture goes into which shard follows from the data alone: those to train on are shuffled once, so that any shard
is a sample of all classes; those to score on are in order, which is how they are read. A shard is the same bytes,
whoever writes it. What is whole stays; `index.json` is written by the process that finds every shard there.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coadvise.data import draws
from coadvise.data.decoding import threaded
from coadvise.data.shards.cache import Kept
from coadvise.data.shards.index import (
    FORMAT,
    IN_SHARD,
    INDEX,
    PLAN,
    ROW,
    Index,
    SplitIndex,
    about_name,
    shard_name,
    written,
)
from coadvise.data.shards.place import FIRST_WAITS, Place, reason
from coadvise.data.shards.samples import Sampler, packed, padded, sample
from coadvise.data.sources import Source, Split
from coadvise.data.sources.names import Names
from coadvise.data.sources.split import TRAIN, Labels, evenly, key
from coadvise.errors import StorageError, UserError
from coadvise.machine import cache_folder, lock

MEGABYTES = 64  # of a shard
MEASURED = 200  # pictures whose bytes are counted to foresee how many make a shard
Progress = Callable[[int, int], None]  # shards done, and all


class Part(NamedTuple):
    """Which shards a process writes: each `of`-th, from `number` on, counted from 0."""

    number: int = 0
    of: int = 1

    @classmethod
    def parsed(cls, text: str) -> "Part":
        """Of K/N, counted from 1. Raises UserError."""
        first, _, count = text.partition("/")
        if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
            raise UserError(f"--part {text}: give K/N, such as 1/4 to 4/4 for four processes")
        return cls(int(first) - 1, int(count))


ALL = Part()


@dataclass(frozen=True)
class Outcome:
    """What `write_shards` did.

    Attributes:
        shards, bytes: of the whole set, as far as it is there.
        made: shards that were written now; the others were there.
        missing: shards that other processes still have to write; without any the index is written.
    """

    shards: int
    bytes: int
    made: int
    missing: int


def write_shards(
    source: Source, place: Place, presize: int = 0, megabytes: float = MEGABYTES, part: Part = ALL,
    progress: Progress = lambda done, total: None,
) -> Outcome:  # fmt: skip
    """Writes those shards of a source that are not there yet, whole and unchanged.

    Args:
        presize: the shorter side of the pictures, pixels; JPEGs stay JPEGs (quality 95), others become PNG. 0, smaller
            pictures and those of more than 8 bits: the bytes as they are.
        megabytes: about the size of a shard.
        part: with processes on several machines: which share of the shards is this one's. Processes on one machine
            take what no other has begun.

    Raises:
        UserError: nobody answers there, it may not be written, or it holds shards of other data.
        StorageError: it cannot be written any more; the same command goes on.
    """
    sampler = partial(sample, presize=presize)
    counts = _planned(source, place, presize, megabytes, sampler)
    jobs = [
        _Job(place, source, name, number, rows, presize)
        for name, split in source.splits.items()
        for number, rows in enumerate(_rows_of_shards(name, len(split), counts[name]))
    ]
    made = 0
    try:
        for done, job in enumerate(jobs):
            progress(done, len(jobs))
            if done % part.of != part.number:
                continue
            with _alone(place, job.name) as mine:
                if mine and job.found() is None:
                    if not made:
                        place.remove(INDEX)  # until all is as it says
                    job.write(sampler)
                    made += 1
        progress(len(jobs), len(jobs))
        with _alone(place, INDEX, wait=True):
            return _indexed(source, place, presize, jobs, made)
    except (PermissionError, FileNotFoundError) as error:
        raise StorageError(
            f"'{place.url}' may no longer be written: {reason(error)}; once it may, run the same command again to go on"
        ) from None


@dataclass(frozen=True)
class _Job:
    """One shard: the rows of a split, in the order in which they are written."""

    place: Place
    source: Source
    split: str
    number: int
    rows: Labels
    presize: int

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)

    def found(self) -> dict[str, Any] | None:
        """What is known of the shard, if it is there as it is to be, by its checksum."""
        if (about := self.about()) is None or about["made_of"] != self.made_of():
            return None
        try:
            return about if hashlib.sha256(self.place.read(self.name)).hexdigest() == about["sha256"] else None
        except FileNotFoundError:
            return None

    def about(self) -> dict[str, Any] | None:
        """What was written about it, if anything."""
        try:
            about = json.loads(self.place.read(about_name(self.split, self.number)))
            whole = about["format"] == FORMAT and all(len(about[field]) == len(self.rows) for field in IN_SHARD)
            return about if whole and {"sha256", "bytes", "made_of"} <= about.keys() else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def made_of(self) -> str:
        """A hash of the names, stamps and labels of its pictures."""
        own = self.source.splits[self.split].subset(self.rows)
        told = hashlib.sha256(json.dumps([self.presize, self.source.classes]).encode())
        told.update(own.keys().astype("<u8").tobytes())
        told.update(own.labels.astype("<u8").tobytes())
        return told.hexdigest()

    def write(self, sampler: Sampler) -> None:
        content, columns = packed(self.source.splits[self.split], self.rows, self.source.classes, sampler)
        self.place.write(self.name, content)
        digest = hashlib.sha256(content).hexdigest()
        facts = {"format": FORMAT, "bytes": len(content), "sha256": digest, "made_of": self.made_of(), **columns}
        self.place.write(about_name(self.split, self.number), json.dumps(facts).encode())


def _rows_of_shards(name: str, pictures: int, count: int) -> Iterator[Labels]:
    order = draws.permutation(0, draws.SHARDS, 0, pictures) if name == TRAIN else np.arange(pictures)
    return (order[start : start + count] for start in range(0, pictures, count))


def _planned(source: Source, place: Place, presize: int, megabytes: float, sampler: Sampler) -> dict[str, int]:
    """How many pictures a shard of each split has; the same for all processes. Raises UserError as `write_shards`."""
    told = hashlib.sha256(json.dumps([source.classes, source.note]).encode())
    for split in source.splits.values():
        for name in split.names():
            told.update(f"{name}\0".encode())
        told.update(split.labels.tobytes())
    plan: dict[str, Any] = {"format": FORMAT, "data": told.hexdigest(), "presize": presize, "megabytes": megabytes}
    try:
        try:
            found = json.loads(place.read(PLAN, waits=FIRST_WAITS))
        except (FileNotFoundError, ValueError):
            found = {**plan, **{name: _per_shard(split, megabytes, sampler) for name, split in source.splits.items()}}
            place.write(PLAN, json.dumps(found).encode())
    except (PermissionError, FileNotFoundError) as error:
        raise UserError(
            f"'{place.url}' may not be written: {reason(error)}; check the address and your rights"
        ) from None
    except StorageError as error:
        raise UserError(f"no shards can be written: {str(error).partition('; once it can')[0]}") from None
    if differs := [name for name, value in plan.items() if found.get(name) != value]:
        raise UserError(
            f"'{place.url}' holds shards with another {differs[0]}"
            + (f" ({found.get(differs[0])}, now {plan[differs[0]]})" if differs[0] != "data" else " behind them")
            + "; give another --out, or remove them first"
        )
    return {name: int(found[name]) for name in source.splits}


def _per_shard(split: Split, megabytes: float, sampler: Sampler) -> int:
    sizes = [len(found.content) for found in threaded(partial(sampler, split), evenly(len(split), MEASURED))]
    return max(1, round(megabytes * 1e6 / (padded(round(sum(sizes) / max(1, len(sizes)))) + 3 * tarfile.BLOCKSIZE)))


@contextmanager
def _alone(place: Place, name: str, wait: bool = False) -> Iterator[bool]:
    """Whether no other process of this machine works on a file; without a cache folder that is not known."""
    if (folder := cache_folder()) is None:
        yield True
        return
    held = folder / "sharding" / hashlib.sha256(f"{_where(place)}/{name}".encode()).hexdigest()[:32]
    held.parent.mkdir(exist_ok=True)
    with held.open("a") as file:
        try:
            lock(file, wait=wait)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
        if mine:
            held.unlink(missing_ok=True)


def _where(place: Place) -> str:
    return place.url if place.local is None else str(Path(place.local).resolve())


def _indexed(source: Source, place: Place, presize: int, jobs: Sequence[_Job], made: int) -> Outcome:
    """Writes the index, if all shards are there."""
    there = {name: place.names(name) for name in source.splits}
    lacking = {job.name for job in jobs if about_name(job.split, job.number).rpartition("/")[2] not in there[job.split]}
    abouts = [
        *threaded(lambda number: None if jobs[number].name in lacking else jobs[number].about(), range(len(jobs)))
    ]
    missing, size = abouts.count(None), sum(about["bytes"] for about in abouts if about)
    if missing:
        return Outcome(len(jobs), size, made, missing)
    splits = {}
    for name, split in source.splits.items():
        own = [(job, about) for job, about in zip(jobs, abouts, strict=True) if job.split == name and about]
        table, names = np.zeros(len(split), ROW), [picture.encode() for picture in split.names()]
        for job, about in own:
            table["shard"][job.rows] = job.number
            for field in IN_SHARD:
                table[field][job.rows] = np.array(about[field], ROW[field].base)
        text = Names.of(names)
        table["name"], table["name_bytes"] = text.starts, text.lengths
        keys = (key(name + content.tobytes()) for name, content in zip(names, table["content"], strict=True))
        table["key"] = np.frombuffer(b"".join(keys), "<u8")
        table["label"] = split.labels
        shards = tuple(Kept(job.name, about["bytes"], about["sha256"]) for job, about in own)
        splits[name] = SplitIndex(
            shards, _kept(place, f"{name}.table", table.tobytes()), _kept(place, f"{name}.names", b"".join(names))
        )
    name = Path(source.where).name or source.where
    place.write(INDEX, written(Index(name, source.classes, source.note, presize, splits)))
    return Outcome(len(jobs), size, made, 0)


def _kept(place: Place, name: str, content: bytes) -> Kept:
    place.write(name, content)
    return Kept(name, len(content), hashlib.sha256(content).hexdigest())
