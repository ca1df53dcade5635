"""What a cluster's tasks report, who may write, and what is begun again; the cluster is this process."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Stopper, assert_same_run, never

from coadvise import fit
from coadvise.config.reading import load_config
from coadvise.config.schema import EngineConfig
from coadvise.errors import Interrupted, LostProcessError, StorageError, UserError
from coadvise.runs import options
from coadvise.runs.executors import cluster
from coadvise.runs.executors.base import Reporter, Task, run_tasks
from coadvise.runs.executors.cluster import RETRIES, Cluster, Needs, Ticket, needs_of, take_over, work
from coadvise.runs.options import FitOptions, StudyOptions
from coadvise.runs.run import TASKS
from coadvise.storage import write_text, writing_only_while
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder, read_records

PARTS = ("teachers/conv", "teachers/inv", "students/advised-0", "students/alone-0")


class Killed(BaseException):
    """Stands for SIGKILL."""


class Here(Cluster):
    """Does a task in this process, and dies in it where it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Needs(1, 0), None)
        self.begun: list[str] = []

    def submit(self, name: str, ticket: Ticket, task: Task) -> "Here.Handle":
        self.begun.append(name)
        with suppress(Killed):
            work(ticket, Path.cwd(), self.needs, task)
        return Here.Handle()

    class Handle:
        def ended(self) -> str:
            return "its process died"

        def cancel(self) -> None:
            return


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu"))


@pytest.fixture
def here(tmp_path: Path) -> Here:
    found = Here(tmp_path / "run")
    found.begin()
    return found


def _die(marks: Path, tries: int, further: bool, reporter: Reporter) -> None:
    """Dies in its first tries, each of which gets a step further, or not."""
    done = len(list(marks.iterdir()))
    (marks / str(done)).touch()
    reporter.progress("network", done + 1 if further else 1, 100, {"total": 1.0})
    reporter.record({"kind": "train", "step": done})
    if done < tries:
        raise Killed


def _raise(error: Exception, reporter: Reporter) -> None:
    raise error


def test_a_task_that_dies_is_begun_again_as_long_as_it_gets_further(here: Here, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    listener, taken = Stopper(never), list[dict[str, Any]]()
    tasks = {"dies": partial(_die, tmp_path / "marks", 2 * RETRIES, True)}
    run_tasks(tasks, here, engine, listener, follow=taken.append)
    assert len(here.begun) == 2 * RETRIES + 1
    assert [record["step"] for record in taken] == list(range(2 * RETRIES + 1))
    assert len(listener.said) == 2 * RETRIES
    assert "dies: its process died; it goes on" in listener.said[0]
    here.close()
    assert not here.folder.exists()


def test_a_task_that_gets_nowhere_is_given_up(here: Here, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    with pytest.raises(LostProcessError, match="dies: its process died; run the same command again"):
        run_tasks({"dies": partial(_die, tmp_path / "marks", 100, False)}, here, engine, Stopper(never))
    assert len(here.begun) == RETRIES + 2  # the first one got to step 1


def test_a_task_that_the_scheduler_stops_goes_on_and_a_fault_is_final(here: Here, engine: Engine) -> None:
    listener = Stopper(never)
    with pytest.raises(LostProcessError, match="run the same command"):
        run_tasks({"limited": partial(_raise, LostProcessError("run the same command"))}, here, engine, listener)
    with pytest.raises(Interrupted, match="at step 3"):
        run_tasks({"limited": partial(_raise, Interrupted("stopped at step 3"))}, here, engine, listener)
    assert "limited: stopped at step 3, as its scheduler asked; it goes on" in listener.said[-1]
    here.begun.clear()
    for error in (UserError("no"), StorageError("full")):
        with pytest.raises(type(error), match=str(error)):
            run_tasks({"fails": partial(_raise, error)}, here, engine, listener)
    with pytest.raises(RuntimeError, match=r"fails failed on .*\n(.*\n)*ZeroDivisionError: oops"):
        run_tasks({"fails": partial(_raise, ZeroDivisionError("oops"))}, here, engine, listener)
    assert here.begun == ["fails"] * 3


def test_only_the_newest_try_may_write(here: Here, engine: Engine, tmp_path: Path) -> None:
    """As where a node that seems dead is cut off and goes on."""
    first = Ticket.new(here.folder, "students/advised-0")
    other = Ticket.new(here.folder, "teachers/conv")
    for ticket in (first, other):
        with writing_only_while(ticket.check):
            write_text(tmp_path / "checkpoint", ticket.task)
    second = Ticket.new(here.folder, "students/advised-0")
    with writing_only_while(first.check), pytest.raises(StorageError, match="another command has taken it over"):
        write_text(tmp_path / "checkpoint", "late")
    with writing_only_while(second.check):
        write_text(tmp_path / "checkpoint", "second")
    assert (tmp_path / "checkpoint").read_text() == "second"

    later = Here(tmp_path / "run")
    later.begin()
    with writing_only_while(second.check), pytest.raises(StorageError):
        write_text(tmp_path / "checkpoint", "late")
    with pytest.raises(StorageError):
        here.start("students/advised-0", partial(_raise, UserError("unreached")))
    here.close()
    assert later.folder.exists(), "it belongs to the later command"


def test_what_tasks_of_a_dead_command_recorded_is_taken_once(here: Here, tmp_path: Path) -> None:
    run = tmp_path / "run"
    record = Recorder(run, write=True, say=print)
    for step in (1, 2, 3):
        record.add("train", part="p", step=step)

    def task(reporter: Reporter) -> None:
        own = Recorder(run, write=False, say=reporter.say, followers=[reporter.record])
        own.rewind("p", 1)
        for step in (2, 3):
            own.add("train", part="p", step=step)
        own.add("result", part="p", step=3)
        raise Killed

    here.start("p", task)
    record.add("train", part="p", step=2)  # what the dead command had taken of it
    with next(here.folder.glob("*.jsonl")).open("a") as journal:
        journal.write('["record", [{"kind": "tr')  # cut off
    take_over(run, record.take_missing)
    assert [(line["kind"], line["step"]) for line in read_records(run)] == [
        ("train", 1), ("train", 2), ("train", 3), ("result", 3),
    ]  # fmt: skip
    assert not (run / TASKS).exists()


def test_a_run_on_a_cluster_finds_the_numbers_of_this_machine_also_after_its_command_died(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters: list[Here] = []

    @contextmanager
    def cluster_of(on: str, folder: Path, *others: Any) -> Iterator[Here]:
        clusters.append(Here(folder))
        yield clusters[-1]
        clusters[-1].close()

    class Dies(Stopper):
        """With what a task has recorded not yet taken."""

        def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            if part == "students/advised-0":
                raise Killed

    monkeypatch.setattr("coadvise.runs.fit.cluster_of", cluster_of)
    monkeypatch.setattr(options, "find_spec", lambda name: ModuleSpec(name, None))
    begin: Callable[..., Path] = partial(fit, tiny_images, tiny_preset, tmp_path / "run", baseline=True, on="ray")
    with pytest.raises(Killed):
        begin(listener=Dies(never))
    run = begin()
    assert [sorted(one.begun) for one in clusters] == [sorted(PARTS), []]
    assert_same_run(run, finished, PARTS)
    assert not (run / TASKS).exists()


def test_needs_are_those_of_the_configuration(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_config("digits")
    assert needs_of(digits, engine) == Needs(1, 0)
    named = load_config("digits", ["engine.cpus=4", "engine.gpus=1"])
    assert str(needs_of(named, engine)) == "4 processors and 1 GPU"
    assert named.to_yaml().count("cpus") == 1
    assert "cpus" not in digits.to_yaml(), "so that hashes of runs stay"
    monkeypatch.setattr(Engine, "device", torch.device("cuda", 0))
    assert needs_of(load_config("digits", ["data.workers=3"]), engine) == Needs(4, 1)


def test_a_place_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"on=ray needs the package ray: pip install 'coadvise\[ray\]'"):
        FitOptions(data="digits", on="ray")
    with pytest.raises(UserError, match=r"pip install 'coadvise\[slurm\]'"):
        FitOptions(data="digits", on="slurm")
    for place in ("rays", "ray://host", "ray://:1", "http://host:1", ""):
        with pytest.raises(UserError, match="give local, ray, ray://HOST:PORT or slurm"):
            FitOptions(data="digits", on=place)
    monkeypatch.setattr(options, "find_spec", lambda name: ModuleSpec(name, None))
    assert FitOptions(data="digits", on="ray://host:10001").on == "ray://host:10001"
    with pytest.raises(UserError, match="leave out one of them"):
        StudyOptions(name="table7", cache=True, on="slurm")
