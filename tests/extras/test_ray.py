"""Networks trained on a Ray cluster: as on this machine, also where a worker dies, the command dies, or is stopped."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import Stopper, assert_same_run, command, never

from coadvise import fit
from coadvise.errors import Interrupted, UserError
from coadvise.studies.runner import run_study

ray: Any = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

PARTS = ("teachers/conv", "teachers/inv", "students/advised-0", "students/alone-0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two processors, in processes that this one starts and so with this test's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def worker_of(task: str) -> list[int]:
    """The process that does a task, by the title that Ray gives it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(f"ray::{task}".encode()):
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile
            continue
    return found


def test_an_address_that_nobody_answers_is_refused(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before another test starts a cluster here, which would be used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=f"--on ray://{address}: no Ray cluster answers at ray://{address}"):
        fit(tiny_images, tiny_preset, tmp_path / "run", on=f"ray://{address}")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"--on ray: no Ray cluster answers at {address}"):
        fit(tiny_images, tiny_preset, tmp_path / "run", on="ray")
    assert not (tmp_path / "run").exists()


def test_a_study_in_which_a_worker_is_killed_finds_the_figures_of_this_machine(
    cluster: None, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    class Kills(Stopper):
        """A worker in mid-training, once."""

        row, step = "", 0

        def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            super().progress(part, done, total, figures)
            if not self.row and 5 <= done < total - 10:
                self.row, self.step = part.rpartition(": ")[0], done
                (worker,) = worker_of(self.row)
                os.kill(worker, signal.SIGKILL)

    epochs = [f"teachers.{name}.recipe.epochs=60" for name in ("conv", "inv")]
    options: dict[str, Any] = {"preset": tiny_preset, "overrides": epochs}
    listener = Kills(never)
    there = run_study("table2", tiny_images, listener, out=tmp_path / "there", on="ray", **options)
    told = "".join(f"{line}\n" for line in listener.said)
    assert len(re.findall(rf"^{re.escape(listener.row)}: its process or node died .* it goes on", told, re.M)) == 1, (
        told
    )
    step = re.search(rf"^{re.escape(listener.row)}: .*: going on from step (\d+)", told, re.M)
    assert step, told
    assert int(step[1]) >= listener.step - 2, "a checkpoint is made each epoch, which has two steps"
    here = run_study("table2", tiny_images, out=tmp_path / "here", **options)
    assert [line["figures"] for line in there["rows"]] == [line["figures"] for line in here["rows"]]
    weights = list((tmp_path / "here").rglob("model.safetensors"))
    assert len(weights) == 2
    for path in weights:
        assert path.read_bytes() == (tmp_path / "there" / path.relative_to(tmp_path / "here")).read_bytes()
    assert not (tmp_path / "there" / ".tasks").exists()


def test_a_stop_is_gentle_and_the_same_call_goes_on(
    cluster: None, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    long = ["teachers.conv.recipe.epochs=100000"]
    stop = Stopper(lambda part, step: part == "teachers/conv" and step >= 3)
    with pytest.raises(Interrupted):
        fit(tiny_images, tiny_preset, tmp_path / "run", stop, overrides=long, on="ray")
    (saved,) = sorted((tmp_path / "run" / "checkpoints" / "teachers.conv").glob("step-*"))[-1:]
    assert int(saved.name[5:]) >= stop.steps[-1][1]
    assert not (tmp_path / "run" / ".tasks").exists()


def test_more_than_there_is_is_refused(cluster: None, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    for change, need in (("engine.gpus=1", "1 processor and 1 GPU"), ("engine.cpus=3", "3 processors")):
        with pytest.raises(UserError, match=rf"needs {need}, but no node has more than 2 processors and 0 GPUs"):
            fit(tiny_images, tiny_preset, tmp_path / "run", on="ray", overrides=[change])
    assert not (tmp_path / "run").exists()


def test_the_command_may_die_and_be_started_again(
    cluster: None, finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    """Ray ends what a dead command has left in it."""
    run = tmp_path / "run"
    arguments = ("fit", tiny_images, "--preset", tiny_preset, "--baseline", "--out", run, "--on", "ray")
    first = subprocess.Popen(
        command(*arguments), env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list((run / "checkpoints").glob("*/step-*")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline, "it does not get going"
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert (run / ".tasks").exists()
    fit(tiny_images, tiny_preset, run, baseline=True, on="ray")
    assert_same_run(run, finished, PARTS)
    assert not (run / ".tasks").exists()
