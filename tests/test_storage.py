"""Files and folders are there whole or not at all, and damage is found."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CrashError, crash_at, damages, seal

from coadvise import storage
from coadvise.errors import UserError
from coadvise.storage import (
    FORMAT,
    MANIFEST,
    OWN,
    STATE,
    WEIGHTS,
    DamagedError,
    contents,
    describe_model,
    read_manifest,
    read_model,
    read_state,
    read_weights,
    write_folder,
    write_model,
    write_text,
    write_weights,
)

SMALL, STEP = {"w": torch.full((3, 2), 1.0)}, {"step": 1, "sums": {"x": torch.ones(2)}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "half": torch.randn(4, 3, generator=generator).bfloat16(),
        "strided": torch.randn(6, 4, generator=generator).T,
        "channels last": torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last),
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    state = {"a": [1, 2.5, None, "x"], "t": {0: torch.arange(3)}}
    write_folder(tmp_path / "c", weights, state, {"step": 9})
    manifest = read_manifest(tmp_path / "c")
    assert manifest["step"] == 9
    assert set(manifest["files"]) == {WEIGHTS, STATE}
    read, again = read_weights(tmp_path / "c"), read_state(tmp_path / "c")
    assert {name: t.dtype for name, t in read.items()} == {name: t.dtype for name, t in weights.items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    assert again["a"] == state["a"]
    assert torch.equal(again["t"][0], torch.arange(3))
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "c").iterdir()} == {"0o644"}


@given(st.sampled_from([WEIGHTS, STATE, MANIFEST]), damages())
def test_any_damage_is_found_and_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, damage: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path_factory.mktemp("c") / "model"
    write_folder(folder, SMALL, STEP, {"classes": ["red", "größer"], "mean": [0.5, 1e-7]})
    wanted, whole = read_manifest(folder), (folder / name).read_bytes()
    changed = damage(whole)
    (folder / name).write_bytes(changed)
    try:
        unnoticed, fault = read_manifest(folder) == wanted, ""
    except DamagedError as error:
        unnoticed, fault = False, str(error)
    same = changed == whole or (unnoticed and name == MANIFEST)  # a space became another space
    assert same or str(folder / name) in fault or (name == MANIFEST and str(folder) in fault)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"files": 3}', "not json", "\x00"])
def test_a_manifest_that_makes_no_sense_is_damage(tmp_path: Path, text: str) -> None:
    write_folder(tmp_path / "c", SMALL, STEP, {})
    (tmp_path / "c" / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match=MANIFEST):
        read_manifest(tmp_path / "c")


def test_format_1_is_read_and_others_are_refused_with_their_version(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_folder(folder, SMALL, STEP, {"step": 1})
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest[OWN]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    assert read_manifest(folder)["step"] == 1
    for version in (0, FORMAT + 1):
        seal(folder, {**manifest, "format": version})
        with pytest.raises(UserError, match=f"c' has format {version}, .* reads 1 and {FORMAT}"):
            read_manifest(folder)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": FORMAT}))
    with pytest.raises(DamagedError, match="sha256 differs"):
        read_manifest(folder)


def test_models(tmp_path: Path) -> None:
    folder = tmp_path / "teachers" / "conv"
    with pytest.raises(UserError, match=r"no model in .*conv"):
        read_model(folder)
    write_model(folder, {"w": torch.ones(2)}, {"model": "resnet_small", "classes": ["a", "ä"]})
    manifest, weights = read_model(folder)
    assert (manifest["model"], manifest["classes"]) == ("resnet_small", ["a", "ä"])
    assert torch.equal(weights["w"], torch.ones(2))
    assert not (folder / STATE).exists()
    before = contents(folder)
    write_model(folder, {"w": torch.zeros(2)}, {"model": "other"})  # replaces it
    assert contents(folder) != before
    assert read_model(folder)[0]["model"] == "other"
    assert [path.name for path in folder.parent.iterdir()] == ["conv"]
    describe_model(folder, {"model": "other", "temperatures": {"class": 1.5}})
    manifest, weights = read_model(folder)
    assert (manifest["temperatures"], weights["w"].tolist()) == ({"class": 1.5}, [0, 0])
    (folder / WEIGHTS).write_bytes(b"x")
    assert contents(folder) == str(folder)
    with pytest.raises(UserError, match=r"damaged model: .*model\.safetensors.*; restore the file, or delete"):
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


@pytest.mark.parametrize(
    ("write", "wanted"),
    [
        (lambda path: write_folder(path, SMALL, STEP, {}), [WEIGHTS, STATE, MANIFEST, ".new.part"]),
        (partial(write_text, text="text"), [".new.part"]),
        (partial(write_weights, weights=SMALL, metadata={}), [".new.part"]),
    ],
    ids=["folder", "text", "weights"],
)
def test_everything_is_on_the_disk_before_it_has_its_name(
    write: Callable[[Path], Any], wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = storage.fsync, Path.rename
    monkeypatch.setattr(storage, "fsync", lambda path: (order.append(path.name), fsync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (order.append("rename"), rename(self, to))[1])
    write(tmp_path / "new")
    assert order == [*wanted, "rename", tmp_path.name]
