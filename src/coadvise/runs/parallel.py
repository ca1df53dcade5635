"""Several tasks at the same time, each in its own process: networks of a run, or runs of a study.

Threads of a small network wait for each other many times a step: on 2 cores, two processes of one thread each train
half as much again as one process with two threads (docs/LOG.md). With several GPUs, each process gets one.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from coadvise.config.schema import RunConfig
from coadvise.data.scan import scan
from coadvise.data.sources import source_of
from coadvise.errors import Interrupted, LostProcessError, StorageError, UserError
from coadvise.runs.run import Run, check_images
from coadvise.runs.schedule import threads_of
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.metrics import Follower, Recorder

Task = Callable[[Listener], None]  # is pickled for another process: a function of a module, or a partial of one


def of_run(run: Run, task: Callable[[Run], None]) -> Task:
    """A task that receives the run, opened again in its own process."""
    return partial(_with_run, run.folder, run.config, run.cache, run.record.write, task)


def in_processes(
    tasks: Mapping[str, Task],
    jobs: int,
    engine: Engine,
    listener: Listener,
    after: Mapping[str, Collection[str]] = MappingProxyType({}),
    follow: Follower = lambda record: None,
) -> None:
    """Runs tasks in order, at most `jobs` at a time. `listener` hears what they report, one call at a time.

    Args:
        after: for a task that must wait, the tasks it waits for. Later tasks may overtake it. Names that are not in
            `tasks` count as done.
        follow: receives each record that a task of a run has written.

    Raises:
        UserError, StorageError: what the first failed task raised. The others were stopped as by a signal, and can
            continue.
        Interrupted: a signal asked for a stop. Every task has saved its step.
        LostProcessError: a process ended without a result.
        Whatever `listener` raises: it stops the work as a failed task does.
    """
    if engine.processes > 1:
        raise UserError("--jobs trains several networks, torchrun one network on several processes; use only one")
    threads = threads_of(jobs)
    waiting, running = dict(tasks), dict[Future[None], _Child]()
    gpus = _gpus(engine)
    fault: BaseException | None = None
    said = threading.Lock()
    with engine.graceful_shutdown(), ThreadPoolExecutor(jobs) as pool:
        while running or (waiting and fault is None):
            undone = waiting.keys() | {child.name for child in running.values()}
            ready = [name for name in waiting if undone.isdisjoint(after.get(name, ()))] if fault is None else []
            for name in ready[: jobs - len(running)]:
                in_use = [child.gpu for child in running.values()]
                child = _Child(name, waiting.pop(name), threads, min(gpus, key=in_use.count) if gpus else None)
                running[pool.submit(child.follow, listener, said, follow)] = child
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
            # Ctrl-C reaches the children too, and one may end before it can save: that is no fault of its task
            stopped = Interrupted("stopped") if engine.stop_requested else None
            fault = fault or stopped or next((error for future in done if (error := future.exception())), None)
            if fault is not None:
                for child in running.values():
                    child.stop()
    if fault is not None:
        raise fault


class _Child:
    """A started process that does one task and reports through a pipe of its own."""

    def __init__(self, name: str, task: Task, threads: int, gpu: str | None) -> None:
        self.name, self.gpu, self._asked = name, gpu, False
        context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads in the middle of work
        self.messages, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(task, threads, theirs))
        with _visible(gpu), _main_hidden(), theirs:  # the process has its own end
            self.process.start()

    def stop(self) -> None:
        """Asks the process to save its step and to end."""
        if not self._asked:
            self._asked = True
            self.process.terminate()

    def follow(self, listener: Listener, said: threading.Lock, follow: Follower) -> None:
        """Passes messages on until the process ends. Raises what the task or the listener raised."""
        fault: Exception | None = None
        finished = False
        with self.messages, suppress(EOFError):
            while True:
                ended = self.process.exitcode is not None  # checked before the pipe, which then holds its last words
                if not self.messages.poll(0 if ended else 0.5):
                    if ended:  # a loader process of a killed one may keep the pipe open
                        break
                    continue
                kind, content = self.messages.recv()
                if kind == "done":
                    finished = True
                elif kind == "fault":
                    fault = fault or content
                else:
                    try:
                        with said:
                            follow(*content) if kind == "record" else getattr(listener, kind)(*content)
                    except Exception as error:  # for example a closed terminal: stop, but let the step be saved
                        fault = fault or error
                        self.stop()
        self.process.join()
        if fault is not None:
            raise fault
        if not finished:
            code = self.process.exitcode
            raise LostProcessError(f"{self.name}: its process ended with exit code {code}; run the same command again")


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
    """A listener in the child; the parent's shows what it hears."""

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


def _with_run(
    folder: Path, config: RunConfig, cache: Path | None, write: bool, task: Callable[[Run], None], listener: "_ToParent"
) -> None:
    """In the child: opens the run as the parent has it."""
    dataset = scan(
        source_of(config), config.data.image_size, config.in_memory, config.data.presize, fit=config.data.fit
    )
    check_images(folder, dataset)
    with Engine(config.engine) as engine, engine.graceful_shutdown():
        record = Recorder(folder, write, listener.say, [listener.record])
        task(Run(folder, config, dataset, engine, record, listener, cache))
