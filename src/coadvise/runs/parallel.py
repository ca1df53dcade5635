"""Several tasks at the same time, each in a process of its own: networks to train, runs of a study.

The threads of a small network wait for each other many times a step: on 2 cores two processes of one thread each get
half as much again done as one process of two threads (docs/LOG.md). Where there are several GPUs each process gets one.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from types import MappingProxyType
from typing import Any

import torch

from coadvise.config import RunConfig
from coadvise.data.scan import scan
from coadvise.data.sources import source_of
from coadvise.errors import Interrupted, LostProcessError, StorageError, UserError
from coadvise.runs.run import Run, check_images, open_record
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.metrics import Recorder

LOOK_EVERY = 5.0  # seconds after which the processes are looked at though messages keep coming

Task = Callable[[Listener], None]  # goes to another process, so it must be a function of a module, or a partial of one


def of_run(run: Run, task: Callable[[Run], None]) -> Task:
    """A task that gets the run as its process has it."""
    return partial(_with_run, run.folder, run.config, run.cache, run.record.write, task)


def check_jobs(jobs: int) -> None:
    if jobs < 1:
        raise UserError(f"jobs={jobs}; at least one network must be trained at a time")


def in_processes(
    tasks: Mapping[str, Task],
    jobs: int,
    engine: Engine,
    listener: Listener,
    after: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> None:
    """Does tasks in order, at most `jobs` at a time; each tells `listener` what it does.

    Args:
        after: of tasks that cannot begin before others are done, which these are; later tasks go ahead of them. What is
            none of `tasks` counts as done.

    Raises:
        UserError, StorageError: what the first task that failed raised; the others are stopped as by a signal, and can
            go on.
        Interrupted: a signal asked for a stop; every task has saved what it has to save.
        LostProcessError: a process ended without a word.
        Whatever `listener` raises: it stops the work as a task that failed does.
    """
    if engine.processes > 1:
        raise UserError(
            "--jobs trains networks side by side, torchrun one network on several processes; use one of them"
        )
    context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads in mid-work
    messages = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting, working = dict(tasks), dict[str, BaseProcess]()
    gpus, placed = _gpus(engine), dict[str, str]()
    fault: Exception | None = None
    told_to_stop: set[str] = set()
    looked, ended = time.monotonic(), set[str]()
    with engine.graceful_shutdown():
        while working or (waiting and fault is None):
            undone = waiting.keys() | working.keys()
            ready = [name for name in waiting if undone.isdisjoint(after.get(name, ()))] if fault is None else []
            for name in ready[: jobs - len(working)]:
                process = context.Process(target=_work, args=(name, waiting.pop(name), threads, messages))
                if gpus:
                    placed[name] = min(gpus, key=[placed[other] for other in working].count)
                with _seeing(placed.get(name)):
                    process.start()
                working[name] = process
            try:
                kind, name, content = messages.get(timeout=0.5)
            except Empty:
                kind, name, content = "", "", None
            if not kind or time.monotonic() - looked > LOOK_EVERY:  # others may talk while one is gone
                looked, ended_before, ended = time.monotonic(), ended, _ended(working)
                for lost in ended & ended_before:  # its last words would have come by now
                    code = working.pop(lost).exitcode
                    error = LostProcessError(f"{lost}: its process ended with exit code {code}; run again to go on")
                    fault = fault or (Interrupted("stopped") if engine.stop_requested else error)
            try:
                if kind == "say":
                    listener.say(content)
                elif kind == "progress":
                    listener.progress(*content)
            except Exception as error:  # a terminal that is gone, for one: no child may outlive that unheard
                fault = fault or error
            if kind in ("done", "fault") and name in working:
                working.pop(name).join()
                if kind == "fault":  # Ctrl-C reaches the children too, and one may end before it can save
                    fault = fault or (Interrupted("stopped") if engine.stop_requested else content)
            if fault is not None or engine.stop_requested:
                fault = fault or Interrupted("stopped")
                for name in working.keys() - told_to_stop:
                    working[name].terminate()  # SIGTERM: it saves its step
                    told_to_stop.add(name)
    if fault is not None:
        raise fault


def _gpus(engine: Engine) -> list[str]:
    """The GPUs of this process by the names that CUDA_VISIBLE_DEVICES takes; none where it computes on a CPU."""
    count = torch.cuda.device_count() if engine.device.type == "cuda" else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


@contextmanager
def _seeing(gpu: str | None) -> Iterator[None]:
    """A process that is started meanwhile sees that GPU alone; None leaves it what there is."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        if gpu is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
            os.environ.update({} if before is None else {"CUDA_VISIBLE_DEVICES": before})


def _ended(working: Mapping[str, BaseProcess]) -> set[str]:
    """The tasks whose processes ended by themselves or were killed; what they said before is on its way at most."""
    return {name for name, process in working.items() if process.exitcode}


class _ToParent:
    """A listener whose words are the parent's to show."""

    def __init__(self, name: str, messages: Any) -> None:
        self.name, self.messages = name, messages

    def say(self, text: str) -> None:
        self.messages.put(("say", self.name, text))

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.messages.put(("progress", self.name, (part, done, total, dict(figures))))


def _outlive_nobody() -> None:
    """Stops this process, its step saved, when the parent is gone: nobody would keep others off the run directory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _work(name: str, task: Task, threads: int, messages: Any) -> None:
    """In the child: does one task."""
    torch.set_num_threads(threads)
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    try:
        task(_ToParent(name, messages))
    except (UserError, StorageError, Interrupted) as error:
        messages.put(("fault", name, error))
    else:
        messages.put(("done", name, None))


def _with_run(
    folder: Path, config: RunConfig, cache: Path | None, write: bool, task: Callable[[Run], None], listener: Listener
) -> None:
    """In the child: opens the run as the parent has it."""
    dataset = scan(source_of(config), config.data.image_size, config.in_memory, config.data.presize)
    check_images(folder, dataset, config.data.image_size)
    with Engine(config.engine) as engine, engine.graceful_shutdown():
        record = open_record(folder, config, engine, listener.say) if write else Recorder(folder, False, listener.say)
        task(Run(folder, config, dataset, engine, record, listener, cache))
