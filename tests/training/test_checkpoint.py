"""Of a network's checkpoints the newest whole one is always found, whatever happens while one is saved."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coadvise.config.schema import EngineConfig, ModelConfig, RecipeConfig
from coadvise.errors import StorageError
from coadvise.models.network import build_network
from coadvise.storage import MANIFEST, STATE, WEIGHTS, read_state, read_weights, write_text
from coadvise.training.checkpoint import WRITING_SHARE, Checkpoints, Schedule, TrainingState
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder
from coadvise.training.nonfinite import NonFiniteGuard
from coadvise.training.optim import make_optimiser


def content(step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {"w": torch.full((3, 2), float(step)), "n": torch.tensor(step)}, {"step": step, "sums": {"x": torch.ones(2)}}


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, *content(step))
    return checkpoints


def step_of(folder: Path | None) -> int:
    assert folder is not None
    return read_state(folder)["step"]


def test_the_newest_is_found_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c", 5, 10, 100, 20)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000020", "step-00000100"]
    folder, faults = checkpoints.latest()
    assert (step_of(folder), faults) == (100, [])
    checkpoints.remove()
    assert checkpoints.latest() == (None, [])
    checkpoints.remove()


@pytest.mark.parametrize("name", [WEIGHTS, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "longer", "changed", "gone"])
def test_a_damaged_file_is_named_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = saved(tmp_path / "c", 1, 2)
    path = checkpoints.folder / "step-00000002" / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        changed = {"truncated": whole[:-7], "emptied": b"", "longer": whole + b"x", "changed": b"\x7f" + whole[1:]}
        path.write_bytes(changed[damage])
    folder, faults = checkpoints.latest()
    assert step_of(folder) == 1
    assert len(faults) == 1
    assert str(path) in faults[0]


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=8))
def test_saving_never_drops_the_newest_whole_one(
    tmp_path_factory: pytest.TempPathFactory, course: list[tuple[int, bool]]
) -> None:
    """Steps go on from what was whole, and any newest one may be damaged between two starts."""
    folder, whole = tmp_path_factory.mktemp("c") / "c", dict[int, None]()
    for steps, damage in course:
        checkpoints = Checkpoints(folder)
        found, _ = checkpoints.latest()
        assert (step_of(found) if found else 0) == max(whole, default=0)
        step = max(whole, default=0) + steps
        checkpoints.save(step, *content(step))
        whole[step] = None
        kept = sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())
        assert kept == sorted(whole)[-2:], "damaged ones are not kept in place of whole ones"
        whole = dict.fromkeys(kept)
        if damage:
            (folder / f"step-{step:08d}" / WEIGHTS).write_bytes(b"")
            del whole[step]


@pytest.mark.parametrize("large", ["weights", "state"])
def test_a_full_disk_leaves_no_partial_and_the_one_before(large: str, small_disk: Callable[[int], Path]) -> None:
    checkpoints = saved(small_disk(1_000_000) / "c", 1)
    weights, state = content(2)
    (weights if large == "weights" else state)["big"] = torch.zeros(1_000_000)
    with pytest.raises(StorageError, match=r"cannot write '.*step-00000002': .*No space left on device"):
        checkpoints.save(2, weights, state)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]
    checkpoints.save(2, *content(2))
    assert step_of(checkpoints.latest()[0]) == 2


def test_a_folder_that_is_gone_or_read_only_is_named(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1_000_000)
    (disk / "run").mkdir()
    checkpoints = saved(disk / "run" / "c", 1)
    (disk / "run").rename(disk / "moved")
    with pytest.raises(StorageError, match="No such file or directory"):
        Checkpoints(disk / "run" / "checkpoints" / "part").save(2, *content(2))
    assert not (disk / "run").exists(), "a run directory without its record was made again"
    (disk / "moved").rename(disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        checkpoints.save(2, *content(2))
    with pytest.raises(StorageError, match="Read-only file system"):
        write_text(disk / "text", "x")
    assert step_of(checkpoints.latest()[0]) == 1


# A process that saves on and on, and is killed by a real signal at the number-th call of a function of `os`.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from coadvise.training.checkpoint import Checkpoints

def save_until(folder, name, number):
    original, calls = getattr(os, name), 0
    def call(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    setattr(os, name, call)
    for step in range(1, 9):
        Checkpoints(folder).save(step, {"w": torch.full((3, 2), float(step))}, {"step": step})

for case in sys.argv[2:]:
    if (child := os.fork()) == 0:
        name, number = case.split("-")
        save_until(Path(sys.argv[1], case), name, int(number))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_sigkill_inside_a_save_leaves_a_whole_one(tmp_path: Path) -> None:
    """Five fsyncs and a rename a save; from the third on, the oldest is removed."""
    cases = {"fsync-5": 1, "fsync-8": 1, "fsync-13": 2, "rename-3": 2, "rmdir-2": 4}
    subprocess.run([sys.executable, "-c", KILLED, tmp_path, *cases], check=True)
    for case, whole in cases.items():
        checkpoints = Checkpoints(tmp_path / case)
        found, faults = checkpoints.latest()
        assert step_of(found) == whole
        assert torch.equal(read_weights(found)["w"], torch.full((3, 2), float(whole)))  # type: ignore[arg-type]
        assert not faults
        assert not list(checkpoints.folder.glob(".*")), "partial files are removed"


def test_a_changed_layer_decay_holds_from_the_checkpoint_on(tmp_path: Path) -> None:
    network = build_network(ModelConfig(model="resnet_small"), ("a", "b"), 16, seed=0)

    def state(layer_decay: float) -> TrainingState:
        optimiser = make_optimiser(network.model, RecipeConfig(layer_decay=layer_decay))
        guard = NonFiniteGuard("part", network, optimiser, engine, Recorder(tmp_path, False, lambda text: None))
        return TrainingState(network, optimiser, None, guard)

    def scales(of: TrainingState) -> list[float]:
        return [group["lr_scale"] for group in of.optimiser.param_groups]

    with Engine(EngineConfig(device="cpu")) as engine:
        before, wanted, restored = state(0.9), state(0.5), state(0.5)
        before.save(1, Checkpoints(tmp_path / "kept"))
        assert restored.restore("part", Checkpoints(tmp_path / "kept"), lambda text: None) == 1
        assert scales(restored) == scales(wanted) != scales(before)


def test_a_checkpoint_is_due_by_time_or_after_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("coadvise.training.checkpoint.time.monotonic", lambda: now)
    by_time, by_epoch = Schedule(60), Schedule(0)
    for now, due in ((59, False), (60, True), (61, True)):  # noqa: B007  (what `monotonic` returns)
        assert by_time.due(epoch_ended=False) is by_time.due(epoch_ended=True) is due
        assert by_epoch.due(epoch_ended=True)
        assert not by_epoch.due(epoch_ended=False)
    for took, wait in ((0.1, 60), (3.0, 3 * WRITING_SHARE)):
        by_time.saved(took)
        last = now
        for now, due in ((last + wait - 1, False), (last + wait, True)):  # noqa: B007
            assert by_time.due(epoch_ended=True) is due
    by_epoch.saved(3.0)
    assert by_epoch.due(epoch_ended=True)
