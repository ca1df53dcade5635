"""A run on two hosts, here network namespaces joined by a cable: it trains, loses the cable, loses a host, goes on."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ONE_EPOCH, Stopper, command, records, without_batch_norm, write_preset

from coadvise import fit
from coadvise.errors import Interrupted

HOSTS = [f"coadvise-{os.getpid()}-{number}" for number in (0, 1)]
CABLE = [f"ca{os.getpid() % 10**6}-{number}" for number in (0, 1)]
ADDRESS = ["10.77.0.1", "10.77.0.2"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
Pair = list["subprocess.Popen[str]"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Two hosts that reach each other and nothing else; the disk is shared."""
    if shutil.which("ip") is None:
        pytest.skip("there is no 'ip' (iproute2) to make network namespaces with")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", CABLE[0], "netns", HOSTS[0], "type", "veth", "peer", "name", CABLE[1], "netns", HOSTS[1])
        for host, end, address in zip(HOSTS, CABLE, ADDRESS, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", end, "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_preset(tmp_path_factory.mktemp("preset"), without_batch_norm())


def start(port: int, *arguments: str | Path) -> Pair:
    """`torchrun --nnodes 2 ...` on both hosts, as docs/TRAINING.md has it."""
    pair = []
    for number, (host, end) in enumerate(zip(HOSTS, CABLE, strict=True)):
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)]
        launcher += ["--master-addr", ADDRESS[0], "--master-port", str(port)]
        pair.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command(*arguments, launcher=launcher)],
                env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": end},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    return pair


def end(pair: Pair) -> list[str]:
    """What both said on stderr, once they have ended by themselves."""
    try:
        return [process.communicate(timeout=300)[1] for process in pair]
    finally:
        for process in pair:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(pair: Pair, run: Path, records_more: int) -> None:
    """Until this many more epochs are recorded."""
    before = len(records(run, "train")) if (run / "metrics.jsonl").exists() else 0
    while not (run / "metrics.jsonl").exists() or len(records(run, "train")) < before + records_more:
        assert all(process.poll() is None for process in pair), end(pair)
        time.sleep(0.05)


def kill(host: str) -> None:
    """Ends all that runs on a host, as a power cut does."""
    pids = subprocess.run(["ip", "netns", "pids", host], check=True, capture_output=True, text=True).stdout.split()
    for pid in map(int, pids):
        os.kill(pid, signal.SIGKILL)


def test_two_hosts_find_what_one_process_finds(hosts: None, tiny_images: Path, preset: str, tmp_path: Path) -> None:
    arguments = (tiny_images, "--preset", preset, *ONE_EPOCH)
    errors = end(pair := start(29511, "fit", *arguments, "--out", tmp_path / "two"))
    assert [process.returncode for process in pair] == [0, 0], errors
    fit(tiny_images, preset, tmp_path / "one", overrides=ONE_EPOCH)
    for kind in ("train", "result"):
        two, one = (records(tmp_path / run, kind) for run in ("two", "one"))
        assert [r["part"] for r in two] == [r["part"] for r in one]
        for left, right in zip(two, one, strict=True):
            for figures in ("losses", "top1", "nll"):
                assert left.get(figures, {}) == pytest.approx(right.get(figures, {}), rel=1e-4)
    assert records(tmp_path / "two", "run")[0]["processes"] == 2


def test_a_cut_cable_a_time_limit_and_a_lost_host_end_both_and_the_run_goes_on(
    hosts: None, tiny_images: Path, preset: str, tmp_path: Path
) -> None:
    long = ["teachers.conv.recipe.epochs=4000", "engine.checkpoint_seconds=0.01", "engine.timeout_seconds=3"]
    run, port = tmp_path / "run", 29521
    arguments = ("fit", tiny_images, "--preset", preset, *long, "--out", run)
    wait_for(pair := start(port, *arguments), run, 2)
    ip("-n", HOSTS[0], "link", "set", CABLE[0], "down")
    began = time.monotonic()
    errors = end(pair)
    assert time.monotonic() - began < 60, "the time-out is 3 seconds"
    ip("-n", HOSTS[0], "link", "set", CABLE[0], "up")
    for number, said in enumerate(errors):
        assert re.search(rf"rank {number} got no answer from rank {1 - number} at step \d+ of teachers/conv", said), (
            said
        )
        assert re.search(r"exitcode\s*: 69", said), said

    reached = records(run, "train")[-1]["step"]
    wait_for(pair := start(port + 1, *arguments), run, 2)  # the same command
    for process in pair:
        os.killpg(process.pid, signal.SIGTERM)  # as SLURM signals torchrun before its time limit
    stops = {int(step) for said in end(pair) for step in re.findall(r"stopped at step (\d+) of", said)}
    assert len(stops) == 1, "all save the same step"
    assert min(stops) > reached

    wait_for(pair := start(port + 2, *arguments), run, 2)
    assert records(run, "train")[-1]["step"] > min(stops)
    kill(HOSTS[1])
    said, _ = end(pair)
    assert re.search(r"rank 0 got no answer from rank 1 at step \d+ of teachers/conv", said), said
    assert re.search(r"exitcode\s*: 69", said), said

    reached = records(run, "train")[-1]["step"]
    alone = Stopper(lambda part, step: step >= reached + 4)
    with pytest.raises(Interrupted):
        fit(tiny_images, preset, run, overrides=long, listener=alone)
    assert alone.steps[-1] == ("teachers/conv", reached + 4)
    losses = [record["losses"]["total"] for record in records(run, "train")]
    assert losses[-1] < losses[0]
