"""Several tasks at the same time: networks of a run, or runs of a study. An executor says where they are done."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from coadvise.config.schema import RunConfig
from coadvise.data.scan import scan
from coadvise.data.sources import source_of
from coadvise.errors import Interrupted, LostProcessError
from coadvise.runs.run import Run, check_images
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.metrics import Follower, Recorder

Task = Callable[["Reporter"], None]  # is pickled for another process: a function of a module, or a partial of one
Message = tuple[str, Any]  # "say", "progress" and "record" with their arguments; "done"; "fault" with an exception


class Reporter(Listener, Protocol):
    """A listener in a task's process, which also takes records."""

    def record(self, record: dict[str, Any]) -> None: ...


class Attempt(Protocol):
    """One try at a task, in a process of its own."""

    def messages(self) -> Iterable[Message]:
        """Those that came since the last call."""

    def ended(self) -> str | None:
        """How its process ended, in words; None while it may still report. Raises UserError if no try can succeed."""

    def stop(self) -> None:
        """Asks the process to save its step and to end."""


class Executor(Protocol):
    """Where tasks are done.

    Attributes:
        jobs: tasks at the same time, at most.
        retries: how often a task is begun again whose process died without getting further than the one before.
        tasks_write: whether tasks write the run's record themselves; otherwise only this process does so.
    """

    jobs: int
    retries: int
    tasks_write: bool

    def start(self, name: str, task: Task) -> Attempt: ...

    def wait(self, attempts: Sequence[Any]) -> None:
        """Returns as soon as one of its attempts may have something to say, and within half a second."""


def of_run(run: Run, task: Callable[[Run], None], executor: Executor) -> Task:
    """A task that receives the run, opened again in its own process."""
    return partial(_with_run, run.folder, run.config, run.cache, run.record.write and executor.tasks_write, task)


def run_tasks(
    tasks: Mapping[str, Task],
    executor: Executor,
    engine: Engine,
    listener: Listener,
    after: Mapping[str, Collection[str]] = MappingProxyType({}),
    follow: Follower = lambda record: None,
) -> None:
    """Runs tasks in order, as many at a time as the executor allows. `listener` hears what they report.

    Args:
        after: for a task that must wait, the tasks it waits for. Later tasks may overtake it. Names that are not in
            `tasks` count as done.
        follow: receives each record of a task of a run.

    Raises:
        UserError, StorageError: what the first failed task raised. The others were stopped as by a signal, and can
            continue.
        Interrupted: a signal asked for a stop. Every task has saved its step.
        LostProcessError: a process ended without a result, and was not begun again or too often.
        Whatever `listener` raises: it stops the work as a failed task does.
    """
    waiting, running = dict(tasks), dict[str, _Running]()
    fault: Exception | None = None
    try:
        with engine.graceful_shutdown():
            while running or (waiting and fault is None):
                undone = waiting.keys() | running.keys()
                ready = [name for name in waiting if undone.isdisjoint(after.get(name, ()))] if fault is None else []
                for name in ready[: executor.jobs - len(running)]:
                    task = waiting.pop(name)
                    running[name] = _Running(name, task, executor, executor.start(name, task))
                executor.wait([one.attempt for one in running.values()])
                found: list[Exception] = []
                for one in list(running.values()):
                    try:
                        over = one.is_over(listener, follow, may_begin=fault is None and not engine.stop_requested)
                    except Exception as error:
                        over = True
                        found.append(error)
                    if over:
                        del running[one.name]
                # Ctrl-C reaches the children too, and one may end before it can save: that is no fault of its task
                stopped = Interrupted("stopped") if engine.stop_requested else None
                fault = fault or stopped or next(iter(found), None)
                for one in running.values() if fault is not None else ():
                    one.stop()
    finally:
        for one in running.values():  # a task could not be begun
            one.stop()
    if fault is not None:
        raise fault


@dataclass
class _Running:
    """A task that was begun, and what is known of it.

    Attributes:
        idle: tries in a row that got no further than those before.
        reached: the steps done, by what the listener calls the network.
    """

    name: str
    task: Task
    executor: Executor
    attempt: Attempt
    idle: int = 0
    reached: dict[str, int] = field(default_factory=dict)
    _further: bool = False
    _finished: bool = False
    _fault: Exception | None = None
    _asked: bool = False

    def stop(self) -> None:
        if not self._asked:
            self._asked = True
            self.attempt.stop()

    def is_over(self, listener: Listener, follow: Follower, may_begin: bool) -> bool:
        """Passes messages on. Returns whether the task is done.

        Args:
            may_begin: a task whose process died, or which something else stopped, is begun again.

        Raises:
            What the task or the listener raised, once no further message will come.
        """
        ended = self.attempt.ended()  # asked before the messages, which then hold its last words
        for kind, content in self.attempt.messages():
            self._take(kind, content, listener, follow)
        if ended is None:
            return False
        if self._finished and self._fault is None:
            return True
        fault = self._fault or LostProcessError(f"{self.name}: {ended}; run the same command again")
        self.idle = 0 if self._further else self.idle + 1
        again = may_begin and isinstance(fault, Interrupted | LostProcessError) and self.executor.retries
        if not again or self.idle > self.executor.retries:
            raise fault
        why = f"{fault}, as its scheduler asked" if self._fault else ended
        listener.say(f"{self.name}: {why}; it goes on from its last checkpoint in a new process")
        self._fault, self._further = None, False
        self.attempt = self.executor.start(self.name, self.task)
        return False

    def _take(self, kind: str, content: Any, listener: Listener, follow: Follower) -> None:
        if kind == "done":
            self._finished = True
        elif kind == "fault":
            self._fault = self._fault or content
        else:
            try:
                self._pass_on(kind, content, listener, follow)
            except Exception as error:  # for example a closed terminal: stop, but let the step be saved
                self._fault = self._fault or error
                self.stop()

    def _pass_on(self, kind: str, content: Any, listener: Listener, follow: Follower) -> None:
        if kind == "record":
            follow(*content)
            return
        if kind == "progress":
            network, done, *_ = content
            self._further = self._further or done > self.reached.get(network, 0)
            self.reached[network] = max(done, self.reached.get(network, 0))
        getattr(listener, kind)(*content)


def _with_run(
    folder: Path, config: RunConfig, cache: Path | None, write: bool, task: Callable[[Run], None], reporter: Reporter
) -> None:
    """In the task's process: opens the run as the one that began it has it."""
    dataset = scan(
        source_of(config), config.data.image_size, config.in_memory, config.data.presize, fit=config.data.fit
    )
    check_images(folder, dataset)
    with Engine(config.engine) as engine, engine.graceful_shutdown():
        record = Recorder(folder, write, reporter.say, [reporter.record])
        task(Run(folder, config, dataset, engine, record, reporter, cache))
