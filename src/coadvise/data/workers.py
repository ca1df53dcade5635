"""Loader processes. One that is killed, crashes or hangs ends the run within seconds, and its picture is named."""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.sharedctypes import RawArray
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from coadvise.errors import StorageError, UserError
from coadvise.machine import available_cores, keep_freed_memory

LOOK_EVERY = 5.0  # seconds without a batch after which the processes are checked
PATIENCE = 30.0  # seconds of waiting in which no process begins or ends a picture: then they hang

# Of a loader process: its id, the picture it is reading (row in the split, -1 for none), since when. PyTorch passes
# nothing but the data set to a process, so there it is a global.
_note: npt.NDArray[np.float64] | None = None


def mark_reading(picture: int) -> None:
    """Notes that this process is about to read a picture, by its row in the split; -1 when its batch is ready."""
    if _note is not None:
        _note[1:] = picture, time.monotonic()


def useful_workers(asked: int) -> int:
    """At most one for each core that this process may use, as PyTorch advises."""
    return min(asked, available_cores())


def seconds_with_workers(making: float, using: float, asked: int, device: str) -> float:
    """Seconds a batch takes when loader processes make its views.

    Args:
        making, using: seconds that one process takes to make the views, and the networks to process them.
        asked: loader processes, before `useful_workers`; 0 makes views in this process.
        device: of the networks. On a CPU they compete with loader processes for it, elsewhere they run in parallel.
    """
    workers = useful_workers(asked)
    if workers and device != "cpu":
        return max(making / workers, using)
    return making / max(1, workers) + using


def worker_batches(dataset: Dataset[Any], workers: int, name: Callable[[int], str], **options: Any) -> Iterator[Any]:
    """Yields what a `DataLoader` of whole batches does, made by `useful_workers(workers)` processes, or by this one.

    Args:
        name: gives the name of what `mark_reading` was called with.
        options: further ones of `DataLoader`.

    Raises:
        UserError: a loader process was killed, crashed or hangs. What the data set raises: a UserError or a
            StorageError as it is, anything else as a RuntimeError that holds the traceback.
    """
    workers = useful_workers(workers)
    if workers == 0:
        yield from DataLoader(dataset, batch_size=None, **options)
        return
    notes = RawArray("d", [0.0, -1.0, 0.0] * workers)
    # A data set is inherited, not pickled as by Python 3.14's default on Linux.
    loader = DataLoader(
        _Safe(dataset), batch_size=None, num_workers=workers, timeout=LOOK_EVERY, worker_init_fn=partial(_begin, notes),
        multiprocessing_context="fork" if sys.platform == "linux" else None, **options,
    )  # fmt: skip
    others = multiprocessing.active_children()
    batches = _start(loader)
    watch = _Watch([child for child in multiprocessing.active_children() if child not in others], notes, name)
    watch.start()
    stop = Finalize(None, watch.stop, exitpriority=1)  # also where this process exits with batches to come
    try:
        while True:
            asked = time.monotonic()
            watch.waiting_since = min(watch.waiting_since, asked)
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):  # PyTorch's own: those of the data set come as values
                timed_out = time.monotonic() - asked >= LOOK_EVERY
                watch.check(wait=0.0 if timed_out else 5.0)
                if not timed_out:
                    raise
                continue  # slow, not dead
            watch.waiting_since = math.inf
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        stop()


class _Safe(Dataset[Any]):
    """Returns what a data set raises, since PyTorch would put a traceback before its text."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.dataset[request]
        except (UserError, StorageError) as error:
            return error
        except Exception:
            return RuntimeError(f"in a loader process: {traceback.format_exc()}")
        finally:
            mark_reading(-1)


def _begin(notes: Any, worker: int) -> None:
    """In a loader process, first."""
    keep_freed_memory()  # a training process on a GPU does not, and a batch of 64 views of 224 pixels takes 39 MB
    global _note
    _note = np.frombuffer(notes).reshape(-1, 3)[worker]
    _note[0] = os.getpid()


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Starts the processes, from a thread, for two reasons.

    They inherit its blocked SIGTERM: when a batch system sends that to the whole process group, the training process
    decides what happens. And only in the main thread does PyTorch set its handler for ended children, which would raise
    in the middle of a step or a save.
    """
    started: list[Iterator[Any]] = []

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        started.append(iter(loader))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    return started[0]


class _Watch(threading.Thread):
    """Kills loader processes that hang: taking over a batch from a stopped process blocks the training process too."""

    def __init__(self, processes: list[Any], notes: Any, name: Callable[[int], str]) -> None:
        super().__init__(daemon=True)
        self.processes, self.notes, self.name_of = processes, np.frombuffer(notes).reshape(-1, 3), name
        self.waiting_since = math.inf  # when the training process began to wait for a batch; infinity: it does not
        self.hung, self.over = False, threading.Event()

    def run(self) -> None:
        while not (self.hung or self.over.wait(LOOK_EVERY)):
            self.hung = time.monotonic() - max(self.waiting_since, self.notes[:, 2].max()) > PATIENCE
        if self.hung:
            self.stop()

    def stop(self) -> None:
        """Ends the thread and all processes, which ignore the SIGTERM that PyTorch sends them."""
        self.over.set()
        for process in self.processes:
            process.kill()

    def check(self, wait: float) -> None:
        """Raises UserError if a process has ended, perhaps after `wait` seconds: its pipes close first."""
        until = time.monotonic() + wait
        while not (ended := [process for process in self.processes if process.exitcode is not None]):
            if time.monotonic() >= until:
                return
            time.sleep(0.01)
        code, row = ended[0].exitcode, self.notes[:, 0] == ended[0].pid
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"crashed (exit code {code})"
        if self.hung:
            row, how = self.notes[:, 1] >= 0, f"has hung for {PATIENCE:.0f} s"
        pid, picture = (*self.notes[row, :2].tolist(), (ended[0].pid, -1))[0]
        where = f"while it read {self.name_of(int(picture))!r}" if picture >= 0 else "while it read no picture"
        raise UserError(
            f"loader process {pid:.0f} {how} {where}; run the same command again to go on, after checking that "
            "picture's disk if it hung, or with fewer data.workers if memory was short"
        )
