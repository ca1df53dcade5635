import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Stopper, assert_same_weights, command, make_images, never, records, weights_of

from coadvise import fit
from coadvise.config import EngineConfig, load_config
from coadvise.data.scan import scan
from coadvise.data.sources import source_of
from coadvise.errors import Interrupted, LostProcessError, UserError
from coadvise.runs import parallel as jobs
from coadvise.runs.parallel import Task, in_processes
from coadvise.runs.run import Run, data_record
from coadvise.studies.runner import run_study
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener, Silent

PARTS = ("teachers/conv", "teachers/inv", "students/advised-0", "students/alone-0")


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread a process, as this process has: sums of the same numbers in the same order."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_two_networks_at_a_time_are_trained_as_one_after_the_other(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    one = fit(tiny_images, tiny_preset, tmp_path / "one", baseline=True)
    listener = Stopper(never)
    two = fit(tiny_images, tiny_preset, tmp_path / "two", baseline=True, jobs=2, listener=listener)
    for part in PARTS:
        assert_same_weights(weights_of(two, part), weights_of(one, part))
        for kind in ("train", "eval", "result"):
            got, wanted = ([r for r in records(run, kind) if r["part"] == part] for run in (two, one))
            assert got == wanted
    assert records(two, "verdict") == records(one, "verdict")
    assert {part for part, _ in listener.steps} == set(PARTS)


def _leave(path: Path, listener: Listener) -> None:
    path.touch()


def _leave_once_there_is(path: Path, other: Path, listener: Listener) -> None:
    deadline = time.monotonic() + 300
    while not other.exists():
        if time.monotonic() > deadline:
            raise UserError(f"no {other.name}")
        time.sleep(0.05)
    path.touch()


def _leave_if_there_is(path: Path, other: Path, listener: Listener) -> None:
    if not other.exists():
        raise UserError(f"no {other.name}")
    path.touch()


def test_a_task_that_must_wait_lets_others_go_ahead(tmp_path: Path) -> None:
    long, waits, free = tmp_path / "long", tmp_path / "waits", tmp_path / "free"
    tasks = {
        "long": partial(_leave_once_there_is, long, free),  # never done if "waits" kept "free" from beginning
        "waits": partial(_leave_if_there_is, waits, long),
        "free": partial(_leave, free),
    }
    in_processes(tasks, 2, Engine(EngineConfig()), Silent(), after={"waits": ["long", "done before"]})
    assert waits.exists()


def _say_what_is_seen(path: Path, other: Path, listener: Listener) -> None:
    path.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    _leave_once_there_is(path.with_suffix(".done"), other, listener)


@pytest.mark.parametrize("before", [None, "3,GPU-1"])
def test_of_several_gpus_each_process_gets_one(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    monkeypatch.setattr(jobs, "_gpus", lambda engine: ["3", "GPU-1"])
    one, two = tmp_path / "one", tmp_path / "two"
    tasks = {"one": partial(_say_what_is_seen, one, two), "two": partial(_say_what_is_seen, two, one)}
    in_processes(tasks, 2, Engine(EngineConfig(device="cpu")), Silent())
    assert (one.read_text(), two.read_text()) == ("3", "GPU-1")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_gpus_go_by_the_names_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    assert jobs._gpus(engine) == []
    monkeypatch.setattr(Engine, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert jobs._gpus(engine) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-1,-1,2")  # what comes after a name of none is not there
    assert jobs._gpus(engine) == ["3", "GPU-1"]


def test_what_waits_for_a_task_that_fails_is_not_begun(tmp_path: Path) -> None:
    tasks = {
        "fails": partial(_leave_if_there_is, tmp_path / "never", tmp_path / "nothing"),
        "waits": partial(_leave, tmp_path / "waits"),
    }
    with pytest.raises(UserError, match="no nothing"):
        in_processes(tasks, 2, Engine(EngineConfig()), Silent(), after={"waits": ["fails"]})
    assert not list(tmp_path.iterdir())


def test_a_student_alone_waits_for_no_teacher(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[set[str], dict[str, list[str]]]] = []

    def ask(tasks: Mapping[str, Task], jobs: int, engine: Engine, listener: Listener, after: Any) -> None:
        asked.append((set(tasks), after))
        raise Interrupted("stopped")

    monkeypatch.setattr(
        sys.modules["coadvise.runs.fit"], "in_processes", ask
    )  # the package has the function by that name
    with pytest.raises(Interrupted):
        fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, jobs=2)
    monkeypatch.setattr(sys.modules["coadvise.studies.runner"], "in_processes", ask)
    with pytest.raises(Interrupted):
        run_study("tokens", tiny_images, tiny_preset, out=tmp_path / "study", jobs=2)
    (parts, after), (rows, needs) = asked
    assert (parts, after) == (set(PARTS), {"students/advised-0": ["teachers/conv", "teachers/inv"]})
    conv, inv = (next(row for row in rows if row.startswith(f"{kind} teacher")) for kind in ("conv", "involution"))
    assert needs["class token alone"] == []
    assert needs["class + conv token"] == [conv]
    assert needs["class + conv + inv token"] == [conv, inv]


def test_a_network_that_fails_is_said_and_the_run_goes_on_later(tiny_preset: str, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    poison = ["teachers.inv.recipe.learning_rate=1e30"]
    with pytest.raises(UserError, match=r"teachers/inv: .* not finite .*lower learning_rate"):
        fit(images, tiny_preset, tmp_path / "run", jobs=2, overrides=poison)
    assert not (tmp_path / "run" / "teachers" / "inv").exists()


def test_in_its_own_process_a_network_is_not_trained_on_other_images(tiny_preset: str, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    config, run = load_config(tiny_preset, source=str(images)), tmp_path / "run"
    run.mkdir()
    dataset = scan(source_of(config), 16, in_memory=True)
    (run / "data.json").write_text(json.dumps(data_record(dataset, 16)))
    begun: list[Run] = []
    jobs._with_run(run, config, None, True, begun.append, Silent())
    assert len(begun) == 1
    (images / "train" / "red" / "0.png").unlink()
    with pytest.raises(UserError, match="the images changed since"):
        jobs._with_run(run, config, None, True, begun.append, Silent())
    assert len(begun) == 1


def test_jobs_must_be_one_or_more(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="jobs=0"):
        fit(tiny_images, tiny_preset, tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


def test_stopped_by_a_signal_every_network_has_saved_its_step(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    slow = ["teachers.conv.recipe.epochs=2000", "teachers.inv.recipe.epochs=2000"]
    process = subprocess.Popen(
        command("fit", tiny_images, *slow, "--jobs", "2", "--preset", tiny_preset, "--out", run),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or len({r["part"] for r in records(run, "train")}) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not get going"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == Interrupted.exit_code
    assert err == "coadvise: stopped; run the same command again to go on\n"
    for part in ("teachers.conv", "teachers.inv"):
        assert list((run / "checkpoints" / part).glob("step-*")), f"{part} has saved nothing"


def _die(listener: Listener) -> None:
    os._exit(7)


def test_a_process_that_dies_is_named() -> None:
    with pytest.raises(LostProcessError, match="first: its process ended with exit code 7; run again to go on"):
        in_processes({"first": _die}, 2, Engine(EngineConfig(device="cpu")), Silent())


def _talk(listener: Listener) -> None:
    for step in range(10_000):
        listener.progress("talks", step, 10_000, {})
        time.sleep(0.05)


def test_a_process_that_dies_is_named_while_another_one_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOOK_EVERY", 0.2)
    listener = Stopper(never)
    with pytest.raises(LostProcessError, match="first: its process ended with exit code 7"):
        in_processes({"first": _die, "second": _talk}, 2, Engine(EngineConfig(device="cpu")), listener)
    assert len(listener.steps) < 10_000
    assert not multiprocessing.active_children()


def test_a_process_whose_parent_is_gone_stops_as_by_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody holds the run directory for it any longer."""
    sentinel, parent_s_end = os.pipe()
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(sentinel=sentinel))
    engine, messages = Engine(EngineConfig(device="cpu")), Queue[Any]()

    def task(listener: Listener) -> None:
        with engine.graceful_shutdown():
            os.close(parent_s_end)
            deadline = time.monotonic() + 60
            while not engine.stop_requested and time.monotonic() < deadline:
                time.sleep(0.01)
        if engine.stop_requested:
            raise Interrupted("stopped")

    jobs._work("name", task, 1, messages)
    os.close(sentinel)
    kind, name, error = messages.get()
    assert (kind, name, type(error)) == ("fault", "name", Interrupted)


def test_a_listener_that_fails_leaves_no_process_behind() -> None:
    class Gone(Silent):
        def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            raise BrokenPipeError("the reader has gone")

    with pytest.raises(BrokenPipeError):
        in_processes({"talks": _talk, "waits": _talk}, 1, Engine(EngineConfig(device="cpu")), Gone())
    assert not multiprocessing.active_children()
