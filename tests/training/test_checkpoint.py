"""Checkpoints are there whole or not at all, and damage is found."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coadvise import storage as checkpoint
from coadvise.errors import StorageError, UserError
from coadvise.storage import (
    MANIFEST,
    STATE,
    WEIGHTS,
    DamagedError,
    read_manifest,
    read_model,
    read_weights,
    write_folder,
    write_model,
    write_text,
    write_weights,
)
from coadvise.training.checkpoint import Checkpoints, read_state


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


def test_what_is_written_is_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "half": torch.randn(4, 3, generator=generator).bfloat16(),
        "strided": torch.randn(6, 4, generator=generator).T,
        "laid out otherwise": torch.randn(2, 3, 4, 4, generator=generator).contiguous(
            memory_format=torch.channels_last
        ),
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    state = {"a": [1, 2.5, None, "x"], "t": {0: torch.arange(3)}}
    write_folder(tmp_path / "c", weights, state, {"step": 9})
    manifest = read_manifest(tmp_path / "c")
    assert manifest["step"] == 9
    assert set(manifest["files"]) == {WEIGHTS, STATE}
    read = read_weights(tmp_path / "c")
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    again = read_state(tmp_path / "c")
    assert again["a"] == state["a"]
    assert torch.equal(again["t"][0], torch.arange(3))
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "c").iterdir()} == {"0o644"}


def test_the_newest_is_found_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c", 5, 10, 100, 20)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000020", "step-00000100"]
    folder, faults = checkpoints.latest()
    assert (step_of(folder), faults) == (100, [])
    checkpoints.remove()
    assert checkpoints.latest() == (None, [])
    checkpoints.remove()


@given(st.sampled_from([WEIGHTS, STATE]), st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_found_and_the_one_before_is_used(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: int, change: int
) -> None:
    checkpoints = saved(tmp_path_factory.mktemp("c") / "c", 1, 2)
    path = checkpoints.folder / "step-00000002" / name
    damaged = bytearray(path.read_bytes())
    damaged[place % len(damaged)] ^= change
    path.write_bytes(damaged)
    folder, faults = checkpoints.latest()
    assert step_of(folder) == 1
    assert len(faults) == 1
    assert str(path) in faults[0]
    assert "sha256" in faults[0]


@pytest.mark.parametrize("name", [WEIGHTS, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "longer", "gone"])
def test_a_damaged_file_is_named_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = saved(tmp_path / "c", 1, 2)
    path = checkpoints.folder / "step-00000002" / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[:-7], "emptied": b"", "longer": whole + b"x"}[damage])
    folder, faults = checkpoints.latest()
    assert step_of(folder) == 1
    assert str(path) in faults[0]


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"files": 3}', "not json", "\x00"])
def test_a_manifest_that_makes_no_sense_is_damage(tmp_path: Path, text: str) -> None:
    saved(tmp_path / "c", 1)
    folder = tmp_path / "c" / "step-00000001"
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match=MANIFEST):
        read_manifest(folder)


def sign(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with the checksum of its own contents."""
    rest = {key: value for key, value in manifest.items() if key != checkpoint.OWN}
    (folder / MANIFEST).write_text(json.dumps({**rest, checkpoint.OWN: checkpoint._digest(rest)}))


def test_a_manifest_names_no_files_elsewhere(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1)
    folder = tmp_path / "c" / "step-00000001"
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../other"] = {"bytes": 1, "sha256": ""}
    sign(folder, manifest)
    with pytest.raises(DamagedError, match="other"):
        read_manifest(folder)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_of_a_manifest_is_found_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
) -> None:
    folder = tmp_path_factory.mktemp("c") / "model"
    write_folder(folder, content(1)[0], None, {"classes": ["red", "größer"], "mean": [0.5, 1e-7], "image_size": 32})
    wanted = read_manifest(folder)
    text = bytearray((folder / MANIFEST).read_bytes())
    text[place % len(text)] ^= change
    (folder / MANIFEST).write_bytes(text)
    try:
        unnoticed, fault = read_manifest(folder) == wanted, ""  # a space became another space
    except DamagedError as error:
        unnoticed, fault = False, str(error)
    assert unnoticed or MANIFEST in fault


def test_format_1_is_read_and_others_are_refused_with_their_version(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c", 1)
    folder = checkpoints.folder / "step-00000001"
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest[checkpoint.OWN]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    assert step_of(checkpoints.latest()[0]) == 1
    for version in (0, checkpoint.FORMAT + 1):
        sign(folder, {**manifest, "format": version})
        with pytest.raises(
            UserError, match=f"step-00000001' is of format {version}, this version of coadvise reads 1 and"
        ):
            checkpoints.latest()
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": checkpoint.FORMAT}))
    with pytest.raises(DamagedError, match="sha256 differs"):
        read_manifest(folder)


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


def test_all_damaged_is_none_left(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c", 1, 2)
    for folder in checkpoints.folder.iterdir():
        (folder / WEIGHTS).write_bytes(b"")
    folder, faults = checkpoints.latest()
    assert folder is None
    assert len(faults) == 2


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c", 1)
    (checkpoints.folder / "step-00000001").rename(checkpoints.folder / ".step-00000001.old")
    assert step_of(checkpoints.latest()[0]) == 1
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]


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


def test_a_folder_that_has_gone_or_is_read_only_is_said(small_disk: Callable[[int], Path]) -> None:
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
from coadvise.checkpoint import Checkpoints
name, number = sys.argv[2], int(sys.argv[3])
original, calls = getattr(os, name), 0
def call(*arguments, **keywords):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)
setattr(os, name, call)
for step in range(1, 9):
    Checkpoints(Path(sys.argv[1])).save(step, {"w": torch.full((3, 2), float(step))}, {"step": step})
"""


@pytest.mark.parametrize(
    ("function", "number", "whole"),
    [("fsync", 5, 1), ("fsync", 8, 1), ("fsync", 13, 2), ("rename", 3, 2), ("rmdir", 2, 4)],
)
def test_sigkill_inside_a_save_leaves_a_whole_one(function: str, number: int, whole: int, tmp_path: Path) -> None:
    """Five fsyncs and a rename a save; from the third on, the oldest is removed."""
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "c", function, str(number)])
    assert done.returncode == -signal.SIGKILL
    checkpoints = Checkpoints(tmp_path / "c")
    found, faults = checkpoints.latest()
    assert step_of(found) == whole
    assert torch.equal(read_weights(found)["w"], torch.full((3, 2), float(whole)))  # type: ignore[arg-type]
    assert not faults
    assert not list(checkpoints.folder.glob(".*")), "what was half-written is swept"


class CrashError(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Makes the number-th call of an `os` function fail, as if the process had been killed there."""
    original, calls = getattr(os, name), 0

    def call(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise CrashError
        return original(*arguments, **keywords)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(("function", "number"), [("fsync", n) for n in range(1, 6)] + [("rename", 1)])
def test_a_crash_while_saving_leaves_the_one_before_and_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    checkpoints = saved(tmp_path / "c", 1)
    with monkeypatch.context() as patch:
        crash_at(patch, function, number)
        with pytest.raises(CrashError):
            checkpoints.save(2, *content(2))
    folder, faults = checkpoints.latest()
    after_the_rename = (function, number) == ("fsync", 5)
    assert step_of(folder) == (2 if after_the_rename else 1)
    assert not faults
    assert not list(checkpoints.folder.glob(".*"))
    checkpoints.save(2, *content(2))
    assert step_of(checkpoints.latest()[0]) == 2


@pytest.mark.parametrize(("function", "number"), [("fsync", n) for n in range(1, 6)] + [("rename", 1), ("rename", 2)])
def test_a_crash_while_replacing_loses_no_other_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    checkpoints = saved(tmp_path / "c", 1, 2)
    with monkeypatch.context() as patch:
        crash_at(patch, function, number)
        with pytest.raises(CrashError):
            checkpoints.save(2, *content(2))
    folder, faults = checkpoints.latest()
    assert step_of(folder) in (1, 2)
    assert not faults


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c", 1)
    for name in (".step-00000002.part", ".step-00000001.old"):
        (checkpoints.folder / name).mkdir()
        (checkpoints.folder / name / WEIGHTS).write_bytes(b"half")
    assert step_of(checkpoints.latest()[0]) == 1
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]


def test_a_state_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"step": 1, "x": Malicious()}, tmp_path / STATE)
    with pytest.raises(DamagedError, match=r"state\.pt: refused"):
        read_state(tmp_path)
    (tmp_path / STATE).write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(DamagedError, match=r"state\.pt: refused"):
        read_state(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_models(tmp_path: Path) -> None:
    folder = tmp_path / "teachers" / "conv"
    with pytest.raises(UserError, match=r"no model in .*conv.*give the folder of a finished network"):
        read_model(folder)
    write_model(folder, {"w": torch.ones(2)}, {"model": "resnet_small", "classes": ["a", "ä"]})
    manifest, weights = read_model(folder)
    assert (manifest["model"], manifest["classes"]) == ("resnet_small", ["a", "ä"])
    assert torch.equal(weights["w"], torch.ones(2))
    assert not (folder / STATE).exists()
    write_model(folder, {"w": torch.zeros(2)}, {"model": "other"})  # replaces it
    assert read_model(folder)[0]["model"] == "other"
    assert [path.name for path in folder.parent.iterdir()] == ["conv"]
    (folder / WEIGHTS).write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"damaged model: .*model\.safetensors.*; restore the file, or delete '.*' and run"
    ):
        read_model(folder)


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        crash_at(patch, function, 1)
        with pytest.raises(CrashError):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, rename = checkpoint.fsync, Path.rename
    monkeypatch.setattr(checkpoint, "fsync", lambda path: (order.append(path.name), fsync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (order.append("rename"), rename(self, to))[1])
    write_folder(tmp_path / "c", *content(1), {})
    assert order == [WEIGHTS, STATE, MANIFEST, ".c.part", "rename", tmp_path.name]


@pytest.mark.parametrize("write", [write_text, partial(write_weights, metadata={})], ids=["text", "weights"])
def test_a_file_is_on_disk_before_it_has_its_name(
    write: Callable[[Path, Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = checkpoint.fsync, Path.rename
    monkeypatch.setattr(checkpoint, "fsync", lambda path: (order.append(path.name), fsync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (order.append("rename"), rename(self, to))[1])
    write(tmp_path / "file", "text" if write is write_text else {"w": torch.ones(2)})
    assert order == [".file.part", "rename", tmp_path.name]
