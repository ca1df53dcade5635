"""Tasks in processes of this machine, by default one a core or one a GPU.

Threads of a small network wait for each other many times a step: on 2 cores, two processes of one thread each train
half as much again as one process with two threads (docs/LOG.md). With several GPUs, each process gets one.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from coadvise.errors import Interrupted, LostProcessError, StorageError, UserError
from coadvise.runs.executors.base import Message, Task
from coadvise.runs.schedule import threads_of
from coadvise.training.engine import Engine


def check_jobs(jobs: int, engine: Engine) -> None:
    """Raises UserError for several jobs where torchrun started this process, and so several of them."""
    if jobs > 1 and engine.processes > 1:
        raise UserError("--jobs trains several networks, torchrun one network on several processes; use only one")


class Local:
    """At most `jobs` processes of this machine, each with its share of the cores. One that dies ends the command."""

    retries = 0
    tasks_write = True

    def __init__(self, jobs: int, engine: Engine) -> None:
        check_jobs(jobs, engine)
        self.jobs, self._threads, self._gpus = jobs, threads_of(jobs), _gpus(engine)
        self._children: list[_Child] = []

    def start(self, name: str, task: Task) -> "_Child":
        self._children = [child for child in self._children if child.ended() is None]
        in_use = [child.gpu for child in self._children]
        child = _Child(task, self._threads, min(self._gpus, key=in_use.count) if self._gpus else None)
        self._children.append(child)
        return child

    def wait(self, attempts: Sequence["_Child"]) -> None:
        multiprocessing.connection.wait([end for child in attempts for end in child.ends()], timeout=0.5)


class _Child:
    """A started process that does one task and reports through a pipe of its own."""

    def __init__(self, task: Task, threads: int, gpu: str | None) -> None:
        self.gpu = gpu
        context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads in the middle of work
        self._pipe: Connection | None
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(task, threads, theirs))
        with _visible(gpu), _main_hidden(), theirs:  # the process has its own end
            self._process.start()

    def ends(self) -> list[Connection | int]:
        """What `multiprocessing.connection.wait` waits for."""
        return [self._process.sentinel, *([self._pipe] if self._pipe else [])]

    def stop(self) -> None:
        self._process.terminate()

    def ended(self) -> str | None:
        if self._process.exitcode is None:
            return None
        self._process.join()
        return f"its process ended with exit code {self._process.exitcode}"

    def messages(self) -> Iterator[Message]:
        """A loader process of a killed one may keep the pipe open, so its end is not waited for."""
        while self._pipe and self._pipe.poll():
            try:
                yield self._pipe.recv()
            except EOFError:
                self._pipe.close()
                self._pipe = None


def _gpus(engine: Engine) -> list[str]:
    """The GPUs of this process by the names that CUDA_VISIBLE_DEVICES takes; none on a CPU."""
    count = torch.cuda.device_count() if engine.device.type == "cuda" else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


@contextmanager
def _visible(gpu: str | None) -> Iterator[None]:
    """A process started inside sees only that GPU; None changes nothing."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        if gpu is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
            os.environ.update({} if before is None else {"CUDA_VISIBLE_DEVICES": before})


@contextmanager
def _main_hidden() -> Iterator[None]:
    """A process started inside does not run the user's program again, as a spawned one does to find what it defines.

    Nothing of it is needed, and a script that calls `coadvise.fit` at its top level would start training there, too.
    """
    names = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: names.pop(name) for name in ("__spec__", "__file__") if name in names}
    names["__spec__"] = None
    try:
        yield
    finally:
        names.update(kept)


class _ToParent:
    """The child's reporter; the parent's listener shows what it hears."""

    def __init__(self, messages: Connection) -> None:
        self.messages, self.lock = messages, threading.Lock()

    def say(self, text: str) -> None:
        self.send("say", (text,))

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.send("progress", (part, done, total, dict(figures)))

    def record(self, record: dict[str, Any]) -> None:
        self.send("record", (record,))

    def send(self, kind: str, content: Any) -> None:
        with self.lock, suppress(OSError):  # the parent is gone: `_stop_with_parent` ends this process
            self.messages.send((kind, content))


def _stop_with_parent() -> None:
    """Stops this process, its step saved, when the parent ends: nothing locks the run directory for it any longer."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _work(task: Task, threads: int, messages: Connection) -> None:
    """In the child: does one task."""
    torch.set_num_threads(threads)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    parent = _ToParent(messages)
    try:
        task(parent)
    except (UserError, StorageError, Interrupted, LostProcessError) as error:
        parent.send("fault", error)
    else:
        parent.send("done", None)
