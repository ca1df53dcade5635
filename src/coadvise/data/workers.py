"""Loader processes that are watched: one that is killed or hangs ends the run in seconds, and its file is named."""

import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from coadvise.errors import UserError
from coadvise.machine import keep_freed_memory

LOOK_EVERY = 5.0  # seconds without a batch after which the loader processes are looked at
PATIENCE = 30.0  # seconds on one file after which a loader process hangs

Rows = npt.NDArray[np.float64]  # [workers, 3]: process id, which file, since when (infinity: none at the moment)

# In a loader process its own row, in memory that the training process sees too. PyTorch hands a worker nothing but the
# data set, and keeps what it knows about itself in a global as well.
_own: Rows | None = None


def taking_up(file: int) -> None:
    """Notes that this process is about to read a file, by its place in the split."""
    if _own is not None:
        _own[1:] = file, time.monotonic()


def useful_workers(asked: int) -> int:
    """At most one for each core that this process may use, as PyTorch advises."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked, cores)


def seconds_with_workers(making: float, using: float, asked: int, device: str) -> float:
    """Seconds a batch takes whose views are made by loader processes.

    Args:
        making, using: seconds that one process takes to make its views, and the networks to answer for them.
        asked: loader processes, before `useful_workers`; 0 makes views in this process.
        device: where the networks are; loader processes share a CPU with them, and work beside any other.
    """
    workers = useful_workers(asked)
    if workers and device != "cpu":
        return max(making / workers, using)
    return making / max(1, workers) + using


def worker_batches(dataset: Dataset[Any], workers: int, paths: Sequence[Path], **options: Any) -> Iterator[Any]:
    """What a `DataLoader` of whole batches yields, with `workers` processes that are watched, or in this one.

    Args:
        workers: those that `useful_workers` leaves of them.
        paths: the files that `taking_up` speaks of.
        options: more of `DataLoader`'s.

    Raises:
        UserError: a loader process was killed, crashed or hangs; what the data set itself raises, in one line.
    """
    workers = useful_workers(workers)
    if workers == 0:
        yield from DataLoader(dataset, batch_size=None, **options)
        return
    rows = RawArray("d", [0.0, -1.0, math.inf] * workers)
    loader = DataLoader(
        _Noted(dataset), batch_size=None, num_workers=workers, timeout=LOOK_EVERY, worker_init_fn=partial(_begin, rows),
        **options,
    )  # fmt: skip
    others = multiprocessing.active_children()
    batches = _start(loader)
    watch = _Watch([child for child in multiprocessing.active_children() if child not in others], rows, paths)
    with watch.looking(), watch.leaving_none():
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except UserError as error:  # PyTorch puts the worker's whole traceback in front
                raise UserError(str(error).rstrip().rpartition("\n")[2].partition("Error: ")[2]) from None
            except RuntimeError as error:
                watch.check()
                if "timed out" not in str(error):
                    raise
                continue  # slow, not dead
            except (OSError, EOFError):  # a process ended while its batch was taken over
                watch.wait_for_an_end()
                watch.check()
                raise
            watch.waiting_since = math.inf
            yield batch
            watch.waiting_since = time.monotonic()


class _Noted(Dataset[Any]):
    """A data set that notes when it has made a batch: from then on its process may wait."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, request: Any) -> Any:
        batch = self.dataset[request]
        if _own is not None:
            _own[2] = math.inf
        return batch


def _begin(rows: Any, worker: int) -> None:
    """In a loader process, first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a process group's is the training process's to obey
    keep_freed_memory()  # a training process on a GPU does not, and a batch of 64 views of 224 pixels takes 39 MB
    global _own
    _own = np.frombuffer(rows).reshape(-1, 3)[worker]
    _own[0] = os.getpid()


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Starts the processes. PyTorch's own watch is taken off: it raises wherever the training process just is."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # kept from them until they ignore it
    try:
        if threading.current_thread() is not threading.main_thread():
            return iter(loader)
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        signal.signal(signal.SIGCHLD, handler)
        return batches
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Watch:
    """Looks after loader processes."""

    def __init__(self, processes: Collection[BaseProcess], rows: Any, paths: Sequence[Path]) -> None:
        self.processes, self.rows, self.paths = processes, np.frombuffer(rows).reshape(-1, 3), paths
        self.waiting_since = time.monotonic()  # when the training process began to wait for a batch
        self.hung = ""

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Has a thread end the processes when one hangs: this process may hang with it, asking for its batch."""
        enough = threading.Event()

        def look() -> None:
            while not (self.hung or enough.wait(LOOK_EVERY)):
                self.hung = self._hangs()
            if self.hung:
                self._kill()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            enough.set()
            thread.join()

    @contextmanager
    def leaving_none(self) -> Iterator[None]:
        """Ends the processes that PyTorch does not end: it asks with SIGTERM, as does Python when it exits."""
        end = Finalize(None, self._kill, exitpriority=1)  # this process may exit with batches to come
        try:
            yield
        finally:
            end()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()

    def wait_for_an_end(self) -> None:
        """Waits, 5 s at most, until a process has ended: its pipes close some moments before it has an exit code."""
        closed = multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout=5)
        for process in self.processes:
            if process.sentinel in closed:
                process.join(timeout=5)

    def check(self) -> None:
        """Raises UserError for a process that hung or has ended."""
        if self.hung:
            raise UserError(f"{self.hung}; look after that file and its disk, and run the same command again to go on")
        for process in self.processes:
            if process.exitcode:
                code = process.exitcode
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "crashed"
                raise UserError(
                    f"loader process {process.pid} {how}{self._while(process.pid)}; run the same command again to go "
                    "on, with fewer data.workers if memory was short"
                )

    def _hangs(self) -> str:
        """A sentence about a process that hangs, or nothing."""
        now, since = time.monotonic(), self.rows[:, 2]
        busy = since < math.inf
        if stuck := self.rows[busy & (now - since > PATIENCE), 0].tolist():
            return f"loader process {stuck[0]:.0f} has hung for {PATIENCE:.0f} s{self._while(stuck[0])}"
        if not busy.any() and now - self.waiting_since > PATIENCE:
            return f"the loader processes have hung for {PATIENCE:.0f} s, none of them reading a file"
        return ""

    def _while(self, process: float | None) -> str:
        """Which file a process is at."""
        file = next((int(file) for owner, file, _ in self.rows if owner == process), -1)
        return f" while it read {str(self.paths[file])!r}" if file >= 0 else " before it read a file"
