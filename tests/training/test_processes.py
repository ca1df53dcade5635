"""A run on two processes: stopped, killed, hung; and taken up by another number of them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from tiny import PRESET, Stopper, command, records, write_preset

from coadvise import fit
from coadvise.errors import Interrupted
from coadvise.training.checkpoint import Checkpoints

TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Networks without batch norm, whose figures are a process's own: two processes compute what one does."""
    values = yaml.safe_load(PRESET)
    for teacher in values["teachers"].values():
        teacher["model"] = "vit_tiny_patch16_224"
        teacher["model_kwargs"] = {"patch_size": 4, "embed_dim": 24, "depth": 1}
    return write_preset(tmp_path_factory.mktemp("preset"), yaml.safe_dump(values))


@contextmanager
def two(data: Path, preset: str, run: Path, *overrides: str) -> Iterator["subprocess.Popen[str]"]:
    """`torchrun ... coadvise fit`; ended with all its processes, whatever comes."""
    arguments = command("fit", data, *overrides, "--preset", preset, "--out", run, launcher=TWO_PROCESSES)
    process = subprocess.Popen(
        arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    ranks: list[int] = []
    try:
        ranks += wait_for(process, run, 2)
        yield process
    finally:
        for pid in (*ranks, process.pid):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def wait_for(process: "subprocess.Popen[str]", run: Path, steps: int) -> list[int]:
    """Waits until epochs have been recorded. Returns the process ids of the ranks, in order."""
    while not (run / "metrics.jsonl").exists() or len(records(run, "train")) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return ranks_of(process)


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    by_rank = {}
    for pid in map(int, children):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        by_rank |= {int(v.removeprefix(b"RANK=")): pid for v in variables if v.startswith(b"RANK=")}
    return [by_rank[rank] for rank in sorted(by_rank)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def last_step(run: Path, part: str) -> int:
    folder, faults = Checkpoints(run / "checkpoints" / part).latest()
    assert folder is not None
    assert not faults
    return int(folder.name.removeprefix("step-"))


def test_one_rank_s_signal_stops_all_at_one_step_and_one_process_goes_on(
    tiny_images: Path, preset: str, tmp_path: Path
) -> None:
    """What comes of it differs from a run on one process by sums in another order, which grow: here to below 1 %."""
    run, long = tmp_path / "run", "teachers.conv.recipe.epochs=60"
    with two(tiny_images, preset, run, long) as process:
        os.kill(ranks_of(process)[1], signal.SIGUSR1)
        _, err = process.communicate(timeout=300)
    stopped = set(re.findall(r"coadvise: stopped at step (\d+) of 120 of teachers/conv; run the same command", err))
    assert stopped == {str(last_step(run, "teachers.conv"))}, err
    assert set(re.findall(r"exitcode\s*: (\d+)", err)) == {"75"}, err

    goes_on, one = Stopper(lambda part, step: step == 110), Stopper(lambda part, step: step == 110)
    for path, listener in ((run, goes_on), (tmp_path / "one", one)):
        with pytest.raises(Interrupted, match="stopped at step 110"):
            fit(tiny_images, preset, path, overrides=[long], listener=listener)
    assert goes_on.steps[0] == ("teachers/conv", int(stopped.pop()) + 1)
    got, wanted = records(run, "train"), records(tmp_path / "one", "train")
    assert [r["step"] for r in got] == [r["step"] for r in wanted] == list(range(2, 111, 2))
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-2, abs=1e-5)


def test_a_killed_rank_ends_the_job_with_its_error_and_a_restart_goes_on(
    tiny_images: Path, preset: str, tmp_path: Path
) -> None:
    run, long = tmp_path / "run", "teachers.conv.recipe.epochs=4000"
    with two(tiny_images, preset, run, long) as process:
        ranks = ranks_of(process)
        os.kill(ranks[1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(map(alive, ranks))
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", err), err
    assert re.search(r"rank 0 got no answer from rank 1 at step \d+ of teachers/conv \(.*\); run the same command", err)
    saved = last_step(run, "teachers.conv")
    rest = Stopper(lambda part, step: True)
    with pytest.raises(Interrupted, match=f"stopped at step {saved + 1} "):
        fit(tiny_images, preset, run, overrides=[long], listener=rest)
    assert rest.steps == [("teachers/conv", saved + 1)]


def test_a_rank_that_hangs_is_named_with_its_step(tiny_images: Path, preset: str, tmp_path: Path) -> None:
    overrides = ["teachers.conv.recipe.epochs=4000", "engine.timeout_seconds=3"]
    with two(tiny_images, preset, tmp_path / "run", *overrides) as process:
        ranks = ranks_of(process)
        os.kill(ranks[1], signal.SIGSTOP)
        while alive(ranks[0]):
            time.sleep(0.1)
        os.kill(ranks[1], signal.SIGKILL)  # torchrun would do it half a minute later
        _, err = process.communicate(timeout=60)
    assert re.search(r"rank 0 got no answer from rank 1 at step \d+ of teachers/conv \(.*[Tt]imed out.*\)", err), err
    assert re.search(r"rank\s*: 0 .*\n\s*exitcode\s*: 69", err), err


LATE = """
import os, time
from pathlib import Path
from coadvise.runs import network_job as part
from coadvise.cli import main

look, deadline = part.is_done, {}

def late(folder, network):
    if os.environ["RANK"] == "1":  # looks only once the other has written all there is to write, or waits for this one
        until = deadline.setdefault(network.part, time.monotonic() + 2)
        while not look(folder, network) and time.monotonic() < until:
            time.sleep(0.02)
    return look(folder, network)

part.is_done = late
main()
"""


def test_a_rank_that_comes_late_does_what_the_other_one_does(tiny_images: Path, preset: str, tmp_path: Path) -> None:
    """A given teacher is written and scored by one rank alone, whatever the other one is at."""
    first = fit(tiny_images, preset, tmp_path / "first")
    script = tmp_path / "late.py"
    script.write_text(LATE)
    given = [f"teachers.{name}.checkpoint={first / 'teachers' / name}" for name in ("conv", "inv")]
    arguments = ["fit", str(tiny_images), *given, "--preset", preset, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *TWO_PROCESSES, str(script), *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r["part"] for r in records(tmp_path / "run", "result")] == [r["part"] for r in records(first, "result")]


def test_ranks_that_read_other_images_are_told_so(tiny_images: Path, preset: str, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        shutil.copytree(tiny_images, tmp_path / rank / "images")
    next((tmp_path / "1" / "images" / "train").rglob("*.png")).unlink()
    script = tmp_path / "elsewhere.py"
    script.write_text("import os; os.chdir(os.environ['RANK']); from coadvise.cli import main; main()")
    arguments = ["fit", "images", "--preset", preset, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *TWO_PROCESSES, str(script), *arguments], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode != 0
    assert "the processes do not read the same images in 'images'" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()
