"""Tasks in processes of their own: order, GPUs, signals, faults, and processes that die."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Stopper, assert_same_run, command, never, records

from coadvise import fit
from coadvise.config.schema import EngineConfig
from coadvise.errors import Interrupted, LostProcessError, UserError
from coadvise.runs.executors import local
from coadvise.runs.executors.base import Executor, Task, run_tasks
from coadvise.runs.executors.local import Local
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener, Silent

PARTS = ("teachers/conv", "teachers/inv", "students/advised-0", "students/alone-0")


@pytest.fixture
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu"))


def test_two_networks_at_a_time_are_trained_as_one_after_the_other(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    listener = Stopper(never)
    two = fit(tiny_images, tiny_preset, tmp_path / "two", baseline=True, jobs=2, listener=listener)
    assert_same_run(two, finished, PARTS)
    assert {part for part, _ in listener.steps} == set(PARTS)


@pytest.mark.slow
def test_a_script_is_not_run_again_by_the_processes_that_it_starts(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import coadvise\n"
        "print('here')\n"
        f"coadvise.fit({str(tiny_images)!r}, {tiny_preset!r}, 'run', jobs=2)\n"
        "print(__spec__, __file__ == sys.argv[0])\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "here\nNone True\n"


def _leave(path: Path, after: Path | None, listener: Listener) -> None:
    """Writes which GPU this process sees into a file, as soon as another file is there."""
    deadline = time.monotonic() + 300
    while after is not None and not after.exists():
        if time.monotonic() > deadline:
            raise UserError(f"no {after.name}")
        time.sleep(0.05)
    path.write_text(os.environ["CUDA_VISIBLE_DEVICES"])


def test_tasks_wait_for_those_they_need_and_each_gets_a_gpu(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local._gpus(engine) == []
    monkeypatch.setattr(Engine, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local._gpus(engine) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-1,-1,2")  # names after -1 do not count
    assert local._gpus(engine) == ["3", "GPU-1"]
    long, waits, free = tmp_path / "long", tmp_path / "waits", tmp_path / "free"
    tasks = {
        "long": partial(_leave, long, free),  # never done if "waits" kept "free" from beginning
        "waits": partial(_leave, waits, None),
        "free": partial(_leave, free, None),
    }
    run_tasks(tasks, Local(2, engine), engine, Silent(), after={"waits": ["long", "done before"]})
    assert waits.stat().st_mtime_ns > long.stat().st_mtime_ns
    assert (long.read_text(), free.read_text()) == ("3", "GPU-1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-1,-1,2"


def test_a_student_alone_waits_for_no_teacher(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[set[str], dict[str, list[str]]]] = []

    def ask(tasks: Mapping[str, Task], where: Executor, engine: Engine, heard: Listener, after: Any, *_: Any) -> None:
        asked.append((set(tasks), after))
        raise Interrupted("stopped")

    monkeypatch.setattr(sys.modules["coadvise.runs.fit"], "run_tasks", ask)
    with pytest.raises(Interrupted):
        fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, jobs=2)
    assert asked == [(set(PARTS), {"students/advised-0": ["teachers/conv", "teachers/inv"]})]


def test_a_network_that_fails_is_named(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    poison = ["teachers.inv.recipe.learning_rate=1e30"]
    listener = Stopper(never)
    with pytest.raises(UserError, match=r"teachers/inv: .* not finite"):
        fit(tiny_images, tiny_preset, tmp_path / "run", jobs=2, overrides=poison, listener=listener)
    assert not (tmp_path / "run" / "teachers" / "inv").exists()
    assert "students/advised-0" not in dict(listener.steps), "what waits for it is not begun"


def test_stopped_by_a_signal_every_network_has_saved_its_step(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    slow = ["teachers.conv.recipe.epochs=2000", "teachers.inv.recipe.epochs=2000"]
    process = subprocess.Popen(
        command("fit", tiny_images, *slow, "--jobs", "2", "--preset", tiny_preset, "--out", run),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or len({r["part"] for r in records(run, "train")}) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not get going"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == Interrupted.exit_code
    assert err.startswith("coadvise: stopped; ")
    assert len(err.splitlines()) == 1
    for part in ("teachers.conv", "teachers.inv"):
        assert list((run / "checkpoints" / part).glob("step-*")), f"{part} has saved nothing"


def _die(other_works: Path, listener: Listener) -> None:
    """Killed while a process of its own keeps the pipe to the parent open, as a loader process does for a moment."""
    while not other_works.exists():
        time.sleep(0.05)
    if os.fork() == 0:
        time.sleep(90)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def _talk(works: Path, listener: Listener) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    with engine.graceful_shutdown():
        for step in range(10_000):
            listener.progress("talks", step, 10_000, {})
            works.touch()
            if engine.stop_requested:
                listener.progress("stopped", 1, 1, {})
                raise Interrupted("stopped")
            time.sleep(0.05)


def test_a_process_that_dies_is_named_within_seconds(engine: Engine, tmp_path: Path) -> None:
    works, listener = tmp_path / "works", Stopper(never)
    tasks = {"talks": partial(_talk, works), "dies": partial(_die, works)}
    with pytest.raises(LostProcessError, match=r"dies: .* exit code -9"):
        run_tasks(tasks, Local(2, engine), engine, listener)
    assert time.time() - works.stat().st_mtime < 45, "not only when the last process that holds its pipe has ended"
    assert ("stopped", 1) in listener.steps, "the other one has saved its step"
    assert not multiprocessing.active_children()


def test_a_listener_that_fails_leaves_no_process_behind(engine: Engine, tmp_path: Path) -> None:
    class Gone(Silent):
        def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            raise BrokenPipeError("the terminal is gone")

    tasks = {name: partial(_talk, tmp_path / name) for name in ("talks", "waits")}
    with pytest.raises(BrokenPipeError):
        run_tasks(tasks, Local(1, engine), engine, Gone())
    assert not multiprocessing.active_children()


def test_a_process_stops_when_its_parent_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing locks the run directory for it any more."""
    sentinel, parents_end = os.pipe()
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(sentinel=sentinel))
    reader, writer = multiprocessing.Pipe(duplex=False)

    def task(listener: Listener) -> None:
        with engine.graceful_shutdown():
            os.close(parents_end)
            deadline = time.monotonic() + 60
            while not engine.stop_requested and time.monotonic() < deadline:
                time.sleep(0.01)
        reader.close()
        listener.say("nobody hears this")
        stopped.set()

    stopped = threading.Event()
    local._work(task, 1, writer)
    os.close(sentinel)
    assert stopped.is_set()
    assert engine.stop_requested
