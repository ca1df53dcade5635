"""What executors of a cluster have in common: tasks on other machines, which share a file system with this one.

A task reports through a file, its journal, which no other process writes; only the process that began it writes the
run's record. A ticket says which try at a task counts: the others may write nothing more. So nothing depends on locks
of files, which a network disk may not keep.
"""

import json
import os
import shutil
import signal
import socket
import threading
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import torch

from coadvise.config.schema import RunConfig
from coadvise.errors import Interrupted, LostProcessError, StorageError, UserError
from coadvise.machine import on_stop_signals
from coadvise.runs.executors.base import Message, Task
from coadvise.runs.run import TASKS
from coadvise.storage import storing, write_text, writing_only_while
from coadvise.training.engine import Engine

RETRIES = 3
POLL_SECONDS = 0.2
_ENDS = {kind.__name__: kind for kind in (UserError, StorageError, Interrupted, LostProcessError)}
Take = Callable[[Sequence[dict[str, Any]]], None]  # of records
_SHOWN_EVERY = 0.5  # seconds between two reports of progress


@dataclass(frozen=True)
class Needs:
    """What a task occupies: processors, as many threads as it computes with, and GPUs (at most one)."""

    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.cpus} processor{'s' * (self.cpus > 1)}" + (f" and {self.gpus} GPU" if self.gpus else "")


def needs_of(config: RunConfig, engine: Engine) -> Needs:
    """What the configuration names. By default a GPU where there is one here, with a processor for each loader."""
    gpus = int(engine.device.type == "cuda") if config.engine.gpus is None else config.engine.gpus
    return Needs(config.engine.cpus or (1 + config.data.workers if gpus else 1), gpus)


@dataclass(frozen=True)
class Ticket:
    """One try at a task. It counts as long as it is the newest one of that task."""

    folder: Path
    task: str
    token: str

    @classmethod
    def new(cls, folder: Path, task: str) -> "Ticket":
        ticket = cls(folder, task, f"{time.time_ns()}-{uuid.uuid4().hex[:8]}")  # sorted, the newest is last
        write_text(ticket.owner, ticket.token)
        return ticket

    @property
    def owner(self) -> Path:
        return self.folder / f"{quote(self.task, safe='')}.owner"

    @property
    def journal(self) -> Path:
        return self.folder / f"{self.token}.jsonl"

    def check(self) -> None:
        """Raises StorageError if another try has taken over, such as that of a command that was started later."""
        try:
            valid = self.owner.read_text() == self.token
        except OSError:
            valid = False
        if not valid:
            raise StorageError(f"{self.task}: another command has taken it over; this one writes nothing more")


class Handle(Protocol):
    """A task that was given to the scheduler."""

    def ended(self) -> str | None:
        """As `Attempt.ended`."""

    def cancel(self) -> None:
        """Sends the signal to stop, or takes it out of the queue."""


class Cluster(ABC):
    """An executor whose tasks run on other machines.

    Args:
        folder: of the run or study; on the shared file system.
        jobs: tasks at the same time, at most; None leaves it to the scheduler.
    """

    retries = RETRIES
    tasks_write = False

    def __init__(self, folder: Path, needs: Needs, jobs: int | None) -> None:
        self.needs, self.jobs = needs, jobs or 10**6
        self._place, self._me = folder.absolute(), Ticket(folder.absolute() / TASKS, "this command", uuid.uuid4().hex)

    @property
    def folder(self) -> Path:
        return self._me.folder

    def begin(self, take: Take = lambda records: None) -> None:
        """Takes over from a command that died. Called by the one that has the run directory; see `take_over`."""
        if self.folder.is_dir():
            self.end_earlier()
        take_over(self._place, take)
        self.folder.mkdir(parents=True)
        write_text(self._me.owner, self._me.token)

    def start(self, name: str, task: Task) -> "_Attempt":
        self._me.check()  # a command that was taken over must not take its tasks back
        ticket = Ticket.new(self.folder, name)
        return _Attempt(ticket, self.submit(name, ticket, task))

    def wait(self, attempts: Sequence["_Attempt"]) -> None:
        time.sleep(POLL_SECONDS)

    @abstractmethod
    def submit(self, name: str, ticket: Ticket, task: Task) -> Handle:
        """Gives `work(ticket, cwd, needs, task)` to the scheduler."""

    def end_earlier(self) -> None:  # noqa: B027  (Ray ends the tasks of a program that died)
        """Ends what a command that died has left with the scheduler."""

    def close(self) -> None:
        """Removes what is only needed while tasks are running."""
        with suppress(StorageError):  # another command's
            self._me.check()
            shutil.rmtree(self.folder, ignore_errors=True)


class _Attempt:
    """A task on another machine."""

    def __init__(self, ticket: Ticket, handle: Handle) -> None:
        self._ticket, self._handle, self._read, self._last = ticket, handle, 0, False

    def messages(self) -> Iterator[Message]:
        lines, self._read = _lines(self._ticket.journal, self._read)
        for kind, content in lines:
            self._last = self._last or kind in ("done", "fault")
            yield (kind, _ENDS.get(content[0], RuntimeError)(content[1])) if kind == "fault" else (kind, content)

    def ended(self) -> str | None:
        return "its process ended" if self._last else self._handle.ended()

    def stop(self) -> None:
        self._handle.cancel()


def _lines(journal: Path, start: int = 0) -> tuple[list[tuple[str, Any]], int]:
    """The whole messages of a journal from a place on, and the place after them."""
    try:
        with journal.open("rb") as file:
            file.seek(start)
            text = file.read()
    except FileNotFoundError:  # not begun yet
        return [], start
    whole = text[: text.rfind(b"\n") + 1]
    return [tuple(json.loads(line)) for line in whole.splitlines()], start + len(whole)


def take_over(folder: Path, take: Take) -> None:
    """Revokes the tickets of a command that died, so that no task of it writes, and takes what they have recorded.

    Args:
        take: gets the records of each task in their order, also those that the dead command had taken already.
    """
    tasks = folder / TASKS
    if not tasks.is_dir():
        return
    for owner in tasks.glob("*.owner"):
        owner.unlink()
    for journal in sorted(tasks.glob("*.jsonl")):
        take([record for kind, content in _lines(journal)[0] if kind == "record" for record in content])
    shutil.rmtree(tasks)


# ---- in the task's process ----


def work(ticket: Ticket, cwd: Path, needs: Needs, task: Task) -> None:
    """Does one task. Its messages, the last of which says how it ended, are in the ticket's journal.

    Raises:
        UserError: this machine cannot do it; nothing was begun.
    """
    if not needs.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise UserError(f"{socket.gethostname()} has no GPU that PyTorch can use; give engine.gpus=0 engine.device=cpu")
    try:
        os.chdir(cwd)  # paths may be relative
        journal = _Journal(ticket)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} does not have '{error.filename}'; start the command in a folder that all machines "
            "share, and give an --out there"
        ) from None
    torch.set_num_threads(needs.cpus)
    # A signal to stop is a KeyboardInterrupt where the engine does not handle it, such as before the first step.
    with on_stop_signals(signal.default_int_handler), writing_only_while(ticket.check):
        try:
            task(journal)
        except KeyboardInterrupt:
            journal.send("fault", "Interrupted", "stopped before its first step")
        except tuple(_ENDS.values()) as error:
            kind = next(name for name, kind in _ENDS.items() if isinstance(error, kind))
            journal.send("fault", kind, str(error))
        except Exception:
            journal.send("fault", "", f"{ticket.task} failed on {socket.gethostname()}:\n{traceback.format_exc()}")
        else:
            journal.send("done")


class _Journal:
    """The task's reporter. A message is a line of JSON, on the disk before the task goes on."""

    def __init__(self, ticket: Ticket) -> None:
        self._path, self._lock, self._shown = ticket.journal, threading.Lock(), 0.0
        ticket.folder.stat()  # it must be there already
        self._file = ticket.journal.open("ab", buffering=0)

    def say(self, text: str) -> None:
        self.send("say", text)

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        if figures or done == total or now - self._shown >= _SHOWN_EVERY:
            self._shown = now
            self.send("progress", part, done, total, dict(figures))

    def record(self, record: dict[str, Any]) -> None:
        self.send("record", record)

    def send(self, kind: str, *content: Any) -> None:
        taken_over = kind == "fault"  # perhaps, and then that must be said nevertheless
        with self._lock, nullcontext() if taken_over else storing(self._path):
            self._file.write((json.dumps([kind, content]) + "\n").encode())
            os.fsync(self._file.fileno())  # a network disk shows what is written to others only then
