"""Several networks of a run trained at the same time, each in a process of its own.

The threads of a small network wait for each other many times a step: on 2 cores two processes of one thread each get
half as much again done as one process of two threads (docs/LOG.md).
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from coadvise.arm import train_arm
from coadvise.config import RunConfig
from coadvise.data.audit import audit
from coadvise.data.sources import open_source
from coadvise.engine import Engine, Interrupted
from coadvise.errors import StorageError, UserError
from coadvise.run import TEACHER, Arm, Run, open_record
from coadvise.teachers import load_teachers


def train_in_processes(run: Run, arms: Sequence[Arm], jobs: int) -> None:
    """Trains networks that do not depend on each other, at most `jobs` at a time.

    Raises:
        UserError, StorageError: what the first network that failed raised; the others are stopped as by a signal, and
            can go on.
        Interrupted: a signal asked for a stop; every network has saved its step.
    """
    if run.engine.processes > 1:
        raise UserError(
            "--jobs trains networks side by side, torchrun one network on several processes; use one of them"
        )
    context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads in mid-work
    messages = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting, working = list(arms), dict[str, BaseProcess]()
    fault: Exception | None = None
    told_to_stop: set[str] = set()
    while working or (waiting and fault is None):
        while waiting and len(working) < jobs and fault is None:
            arm = waiting.pop(0)
            working[arm.part] = context.Process(target=_work, args=(run.folder, run.config, arm, threads, messages))
            working[arm.part].start()
        try:
            kind, part, content = messages.get(timeout=0.5)
        except Empty:
            kind, part, content = _look_after(working)
        if kind == "say":
            run.listener.say(content)
        elif kind == "progress":
            run.listener.progress(part, *content)
        elif kind in ("done", "fault"):
            working.pop(part).join()
            if kind == "fault":  # Ctrl-C reaches the children too, and one may end before it can save
                fault = fault or (Interrupted("stopped") if run.engine.stop_requested else content)
        if fault is not None or run.engine.stop_requested:
            fault = fault or Interrupted("stopped")
            for part in working.keys() - told_to_stop:
                working[part].terminate()  # SIGTERM: it saves its step
                told_to_stop.add(part)
    if fault is not None:
        raise fault


def _look_after(working: Mapping[str, BaseProcess]) -> tuple[str, str, Any]:
    """A process that ended without a word is an error of its own."""
    for part, process in working.items():
        if process.exitcode:
            return (
                "fault",
                part,
                UserError(f"{part}: its process ended with exit code {process.exitcode}; run again to go on"),
            )
    return "", "", None


class _ToParent:
    """A listener whose words are the parent's to show."""

    def __init__(self, part: str, messages: Any) -> None:
        self.part, self.messages = part, messages

    def say(self, text: str) -> None:
        self.messages.put(("say", self.part, text))

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.messages.put(("progress", part, (done, total, dict(figures))))


def _outlive_nobody() -> None:
    """Stops this process, its step saved, when the parent is gone: nobody would keep others off the run directory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _work(folder: Path, config: RunConfig, arm: Arm, threads: int, messages: Any) -> None:
    """In the child: opens the run as the parent has it and trains one network."""
    torch.set_num_threads(threads)
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    listener = _ToParent(arm.part, messages)
    try:
        source = open_source(config.data.source, config.data.val_fraction, config.seed)
        dataset = audit(source, config.data.image_size, in_memory=config.in_memory)
        engine = Engine(config.engine)
        run = Run(folder, config, dataset, engine, open_record(folder, config, engine, listener.say), listener)
        if arm.role != TEACHER:
            run.teachers = load_teachers(
                {name: folder / "teachers" / name for name in config.teachers}, dataset.classes
            )
        with engine.stops_gently():
            train_arm(run, arm)
    except (UserError, StorageError, Interrupted) as error:
        messages.put(("fault", arm.part, error))
    else:
        messages.put(("done", arm.part, None))
