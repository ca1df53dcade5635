"""A run on two processes: stopped, killed, hung, and continued by another number of them; what each of them does."""

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
import torch
from tiny import Stopper, command, records, without_batch_norm, write_preset

from coadvise import fit
from coadvise.config.schema import EngineConfig, ModelConfig
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.errors import Interrupted
from coadvise.evaluation import scores
from coadvise.models.network import build_network
from coadvise.training.checkpoint import Checkpoints
from coadvise.training.engine import Engine

TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_preset(tmp_path_factory.mktemp("preset"), without_batch_norm())


def script(folder: Path, text: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Runs a script on two processes to its end, in `folder`."""
    path = folder / "script.py"
    path.write_text(text)
    return subprocess.run(
        [sys.executable, *TWO_PROCESSES, str(path), *map(str, arguments)], env={**os.environ, **ENVIRONMENT},
        cwd=folder, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


@contextmanager
def two(data: Path, preset: str, run: Path, *overrides: str) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """`torchrun ... coadvise fit` after two epochs, and its ranks' process ids; all of them are ended afterwards."""
    arguments = command("fit", data, *overrides, "--preset", preset, "--out", run, launcher=TWO_PROCESSES)
    process = subprocess.Popen(
        arguments, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    ranks: list[int] = []
    try:
        while not (run / "metrics.jsonl").exists() or len(records(run, "train")) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        ranks += ranks_of(process)
        yield process, ranks
    finally:
        for pid in (*ranks, process.pid):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


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
    run, long = tmp_path / "run", "teachers.conv.recipe.epochs=40"
    with two(tiny_images, preset, run, long) as (process, ranks):
        os.kill(ranks[1], signal.SIGUSR1)
        _, err = process.communicate(timeout=300)
    stopped = set(re.findall(r"stopped at step (\d+) of 80 of teachers/conv", err))
    assert stopped == {str(last_step(run, "teachers.conv"))}, err
    assert set(re.findall(r"exitcode\s*: (\d+)", err)) == {"75"}, err

    goes_on = Stopper(lambda part, step: step == 70)
    with pytest.raises(Interrupted, match="stopped at step 70"):
        fit(tiny_images, preset, run, overrides=[long], listener=goes_on)
    assert goes_on.steps[0] == ("teachers/conv", int(stopped.pop()) + 1)
    losses = [r["losses"]["total"] for r in records(run, "train")]
    assert len(losses) == 35
    assert losses[-1] < losses[0] / 2


def test_a_killed_rank_ends_the_job_with_its_error_and_a_restart_goes_on(
    tiny_images: Path, preset: str, tmp_path: Path
) -> None:
    run, long = tmp_path / "run", ["teachers.conv.recipe.epochs=4000", "engine.checkpoint_seconds=0.01"]
    with two(tiny_images, preset, run, *long) as (process, ranks):
        while not list((run / "checkpoints").glob("*/step-*")):
            time.sleep(0.02)
        os.kill(ranks[1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(map(alive, ranks))
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", err), err
    assert re.search(r"rank 0 got no answer from rank 1 at step \d+ of teachers/conv \(.*\); run the same command", err)
    saved, rest = last_step(run, "teachers.conv"), Stopper(lambda part, step: True)
    with pytest.raises(Interrupted, match=f"stopped at step {saved + 1} "):
        fit(tiny_images, preset, run, overrides=long, listener=rest)
    assert rest.steps == [("teachers/conv", saved + 1)]


def test_a_rank_that_hangs_is_named_with_its_step(tiny_images: Path, preset: str, tmp_path: Path) -> None:
    overrides = ["teachers.conv.recipe.epochs=4000", "engine.timeout_seconds=3"]
    with two(tiny_images, preset, tmp_path / "run", *overrides) as (process, ranks):
        os.kill(ranks[1], signal.SIGSTOP)
        while alive(ranks[0]):
            time.sleep(0.1)
        os.kill(ranks[1], signal.SIGKILL)  # torchrun would do it half a minute later
        _, err = process.communicate(timeout=60)
    assert re.search(r"rank 0 got no answer from rank 1 at step \d+ of teachers/conv \(.*[Tt]imed out.*\)", err), err
    assert re.search(r"rank\s*: 0 .*\n\s*exitcode\s*: 69", err), err


LATE = """
import os, time
from coadvise.runs import network_job
from coadvise.cli import main

look, deadline = network_job.is_done, {}

def late(folder, part):
    if os.environ["RANK"] == "1":  # looks only once the other has written all there is to write, or waits for this one
        until = deadline.setdefault(part.name, time.monotonic() + 2)
        while not look(folder, part) and time.monotonic() < until:
            time.sleep(0.02)
    return look(folder, part)

network_job.is_done = late
main()
"""


@pytest.mark.slow
def test_a_rank_that_comes_late_does_what_the_other_one_does(
    tiny_images: Path, preset: str, finished: Path, tmp_path: Path
) -> None:
    """A given teacher is written and scored by one rank alone, whatever the other one does meanwhile."""
    given = [f"teachers.{name}.start={finished / 'teachers' / name}" for name in ("conv", "inv")]
    done = script(tmp_path, LATE, "fit", tiny_images, *given, "--preset", preset, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [r["part"] for r in records(tmp_path / "run", "result")]
    assert found == ["teachers/conv", "teachers/inv", "students/advised-0"]


ELSEWHERE = "import os; os.chdir(os.environ['RANK']); from coadvise.cli import main; main()"


def test_ranks_that_read_other_images_are_told_so(tiny_images: Path, preset: str, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        shutil.copytree(tiny_images, tmp_path / rank / "images")
    next((tmp_path / "1" / "images" / "train").rglob("*.png")).unlink()
    done = script(tmp_path, ELSEWHERE, "fit", "images", "--preset", preset, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert "the processes do not read the same images in 'images'" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


# Rank 1 alone sees a non-finite loss in its step 2, and has other buffers than rank 0.
TOGETHER = """
import sys, torch
from pathlib import Path
from coadvise.config.schema import EngineConfig, ModelConfig
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.evaluation import scores
from coadvise.models.network import build_network
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder
from coadvise.training.nonfinite import NonFiniteGuard
with Engine(EngineConfig(device="cpu")) as engine:
    assert engine.any_rank(engine.rank == 1, False) == (True, False)
    assert engine.equal_on_all_ranks("text") and not engine.equal_on_all_ranks(f"text {engine.rank}")
    folder = Path(sys.argv[2], str(engine.rank))
    folder.mkdir()
    weight = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = NonFiniteGuard("part", torch.nn.Identity(), optimiser, engine, Recorder(folder, True, lambda text: None))
    for step in (1, 2, 3):
        weight.grad = torch.ones(2)
        fault = engine.rank == 1 and step == 2
        guard.observe({}, {"total": torch.tensor(float("nan") if fault else 1.0)}, 1)
        guard.decide(step, weight.grad.norm())
        optimiser.step()
    guard.report()
    torch.save([weight.detach(), optimiser.state[weight]["step"]], folder / "end.pt")

    network = build_network(ModelConfig.model_validate_json(sys.argv[3]), ("a", "b", "c"), 16, seed=0)
    for name, buffer in network.named_buffers():
        if "running_mean" in name:
            buffer.add_(engine.rank)
    val, forward, answered = scan(open_source(Path(sys.argv[1])), 16, in_memory=True).val, network.forward, []
    network.forward = lambda images: answered.append(len(images)) or forward(images)
    for scores.BATCH in (5, 250):
        answered.clear()
        logits = scores.predict_logits(network, val, 16, engine)
        torch.save((logits, list(answered)), folder / f"{scores.BATCH}.pt")
"""


def test_all_know_and_skip_what_one_sees_and_each_scores_its_share(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(model="resnet_small", model_kwargs={"widths": [8], "depths": [1], "strides": [2]})
    done = script(tmp_path, TOGETHER, tiny_images, tmp_path, model.model_dump_json())
    assert done.returncode == 0, done.stderr
    ends = [torch.load(tmp_path / rank / "end.pt") for rank in "01"]
    assert torch.equal(ends[0][0], ends[1][0])
    assert [end[1].item() for end in ends] == [2, 2]
    for rank in "01":
        assert records(tmp_path / rank) == [{"kind": "skipped", "part": "part", "step": 2, "terms": ["total loss"]}]

    val = scan(open_source(tiny_images), 16, in_memory=True).val
    network = build_network(model, ("a", "b", "c"), 16, seed=0)  # with rank 0's buffers
    shares = {5: ([5, 2], [5]), 250: ([12], [12])}  # rank 1 has no batch of 250: it computes one for its shape alone
    for batch, share in shares.items():
        monkeypatch.setattr(scores, "BATCH", batch)
        alone = scores.predict_logits(network, val, 16, Engine(EngineConfig(device="cpu")))
        for rank in (0, 1):
            logits, answered = torch.load(tmp_path / str(rank) / f"{batch}.pt")
            assert answered == share[rank]
            assert logits.keys() == alone.keys()
            assert torch.equal(logits["class"].view(torch.int32), alone["class"].view(torch.int32)), "the same bits"
