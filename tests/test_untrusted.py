"""Runs, models and configurations that come from strangers: nothing is executed, fetched, or written elsewhere."""

import hashlib
import io
import json
import os
import pickle
import re
import socket
import string
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiny import contents, damages, seal

import coadvise
from coadvise import fit, load
from coadvise.config import (
    EngineConfig,
    ModelConfig,
    RunConfig,
    load_config,
    parse_config,
    preset_names,
    preset_text,
    read_config,
)
from coadvise.errors import UserError
from coadvise.evaluation import scores as evaluate
from coadvise.models.network import build_network, load_network
from coadvise.runs.evaluate import evaluate_run
from coadvise.storage import MANIFEST, STATE, WEIGHTS, DamagedError, write_folder
from coadvise.training.checkpoint import Checkpoints, TrainingState
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder
from coadvise.training.nonfinite import NonFiniteGuard

PACKAGE = Path(coadvise.__file__).parent


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(autouse=True)
def _nothing_is_started_or_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a program was started or the network asked")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


FORBIDDEN = re.compile(
    r"(?<![.\w])(eval|exec)\(|(import|from) (pickle|marshal|shelve|dill|joblib|runpy)\b|torch\.hub|jit\.load"
    r"|yaml\.(load|unsafe_load|full_load)\w*\(|\bnp\.load\(|weights_only=(?!True)|shell=True|os\.(system|popen)\("
    r"|torch\.load\((?![^()]*weights_only=True)|from torch import.*\bload\b"
)


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 40
    assert {str(path): found for path in modules if (found := FORBIDDEN.search(path.read_text()))} == {}
    for line in ("import pickle", "torch.load(path)", "torch.load(path, weights_only=safe)", "yaml.load(text)"):
        assert FORBIDDEN.search(line)


def assert_one_sentence(error: Exception, names: Path | str) -> None:
    assert str(names) in str(error)
    assert "\n" not in str(error)
    assert 0 < len(str(error)) < 2000


def deceiving(folder: Path, **files: bytes) -> Path:
    """A folder whose manifest fits its files: made by a stranger, not damaged."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, {"w": torch.ones(2)}, {"step": 1}, {})
    for name, content in files.items():
        (folder / {"weights": WEIGHTS, "state": STATE}[name]).write_bytes(content)
    reseal(folder, json.loads((folder / MANIFEST).read_text()))
    return folder


def reseal(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest with right checksums of its files and of itself."""
    files = manifest.get("files")
    for name, entry in files.items() if isinstance(files, dict) else ():
        if name in (WEIGHTS, STATE) and isinstance(entry, dict):
            content = (folder / name).read_bytes()
            entry.update({"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    seal(folder, manifest)


def malicious_states(folder: Path) -> dict[str, bytes]:
    """Files that would make a folder: as PyTorch's zip, as its old format, as plain pickle; and a list."""
    zipped, old = io.BytesIO(), io.BytesIO()
    torch.save({"step": 1, "x": Malicious(folder / "executed")}, zipped)
    torch.save({"step": 1, "x": Malicious(folder / "executed")}, old, _use_new_zipfile_serialization=False)
    plain, listed = pickle.dumps(Malicious(folder / "executed"), protocol=2), io.BytesIO()
    torch.save([1, 2], listed)
    return {"zipped": zipped.getvalue(), "old": old.getvalue(), "plain": plain, "list": listed.getvalue()}


@pytest.mark.parametrize("kind", ["zipped", "old", "plain", "list"])
def test_a_state_that_would_run_code_ends_the_run_with_one_sentence(tmp_path: Path, kind: str) -> None:
    deceiving(tmp_path / "checkpoints" / "step-00000001", state=malicious_states(tmp_path)[kind])
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    folder, found = checkpoints.latest()
    assert folder is not None
    assert not found, "by its checksums it is whole"
    network = build_network(TINY, ["a", "b"], 16, 0)
    record = Recorder(tmp_path, False, lambda text: None)
    engine, optimiser = Engine(EngineConfig(device="cpu")), torch.optim.AdamW(network.parameters(), fused=True)
    (folder / WEIGHTS).write_bytes(save(network.model.state_dict()))
    reseal(folder, json.loads((folder / MANIFEST).read_text()))
    state = TrainingState(network, optimiser, None, NonFiniteGuard("part", network, optimiser, engine, record))
    with pytest.raises(UserError, match=r"part: .*state\.pt: .*; remove '.*step-00000001' to go on"):
        state.restore("part", checkpoints, record.say)
    assert not (tmp_path / "executed").exists()


HEADERS = {
    "a header of 10^12 bytes": struct.pack("<Q", 10**12) + b"{}",
    "a tensor of 10^12 bytes": b'{"w":{"dtype":"F32","shape":[250000000000],"data_offsets":[0,1000000000000]}}',
    "a negative shape": b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "overlapping tensors": (
        b'{"v":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    ),
    "a pickle": pickle.dumps({"w": 1}),
    "nothing": b"",
}


@pytest.mark.parametrize("what", HEADERS)
def test_weights_that_claim_too_much_are_refused_before_memory_is_taken(tmp_path: Path, what: str) -> None:
    content = HEADERS[what]
    if content.startswith(b"{"):
        content = struct.pack("<Q", len(content)) + content + bytes(4)
    deceiving(tmp_path / "model", weights=content)
    with pytest.raises(UserError, match=r"damaged model: .*model\.safetensors"):
        load_network(tmp_path / "model")


TINY = ModelConfig(model="resnet_small", model_kwargs={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]})
ABOUT: dict[str, Any] = {
    "model": TINY.model, "model_kwargs": TINY.model_kwargs,
    "classes": ["a", "b"], "image_size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}  # fmt: skip


def stranger(folder: Path, **changes: Any) -> Path:
    """A model folder whose manifest says something else, with right checksums."""
    write_folder(folder, build_network(TINY, ["a", "b"], 16, 0).model.state_dict(), None, ABOUT)
    seal(folder, {**json.loads((folder / MANIFEST).read_text()), **changes})
    return folder


def test_the_stranger_s_model_is_good_before_it_is_changed(tmp_path: Path) -> None:
    assert load_network(stranger(tmp_path / "model")).classes == ("a", "b")


@pytest.mark.parametrize(
    "name",
    ["hf-hub:someone/model", "hf_hub:someone/model", "local-dir:/etc", "../../model", "/etc/passwd", ""],
)
def test_a_model_s_name_is_one_of_timm_s_registry_and_no_place(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="unknown model"):
        load_network(stranger(tmp_path / "model", model=name))
    with pytest.raises(UserError, match="unknown model"):
        build_network(ModelConfig(model=name), ["a", "b"], 16, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "/tmp/x.pt"}, {"pretrained": True}, {"pretrained_cfg": {"url": "https://localhost/x"}},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}, {"cache_dir": "/tmp/x"}, {"num_classes": 7},
    ],
)  # fmt: skip
def test_a_model_s_arguments_open_and_fetch_nothing(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"must not contain {next(iter(arguments))}"):
        load_network(stranger(tmp_path / "model", model_kwargs={**ABOUT["model_kwargs"], **arguments}))
    with pytest.raises(UserError, match="must not contain"):
        build_network(ModelConfig(model="resnet_small", model_kwargs=arguments), ["a", "b"], 16, 0)


ODD = (
    None, True, -1, 10**12, 1e308, "", "x" * 1000, "hf-hub:a/b", "local-dir:/etc", "../../x", [], {}, [[[]]],
    {"checkpoint_path": "/etc/passwd"}, {"pretrained": True}, ["a"] * 5, [0, 0], [8, -16], "\ud800", "resnet18",
)  # fmt: skip


@settings(max_examples=60)
@given(st.data())
def test_a_deceiving_model_is_loaded_or_refused_with_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Something else, or nothing, at any place of the manifest; or other bytes of the weights. Checksums are right."""
    folder = stranger(tmp_path_factory.mktemp("stranger") / "model")
    manifest = json.loads((folder / MANIFEST).read_text())
    if data.draw(st.integers(0, 3)):
        change_somewhere(manifest, data)
    else:
        (folder / WEIGHTS).write_bytes(data.draw(damages())((folder / WEIGHTS).read_bytes()))
    reseal(folder, manifest)
    try:
        load_network(folder)
    except UserError as error:
        assert_one_sentence(error, folder)


def change_somewhere(value: Any, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    inner = value[key]
    if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
        change_somewhere(inner, data)
    elif isinstance(value, dict) and data.draw(st.integers(0, 4)) == 0:
        del value[key]
    else:
        value[key] = data.draw(st.sampled_from(ODD))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "other"])
def test_a_manifest_s_files_are_those_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = stranger(tmp_path / "model")
    manifest = json.loads((folder / MANIFEST).read_text())
    (tmp_path / "x").write_bytes(b"x")
    manifest["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    seal(folder, manifest)
    with pytest.raises(UserError, match=f"{name}: missing"):
        load_network(folder)


def yaml_bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(lines)


TEXTS: dict[str, Callable[[Path], str]] = {
    "runs a function": lambda folder: f'seed: !!python/object/apply:os.mkdir ["{folder}/executed"]',
    "imports": lambda folder: "!!python/module:antigravity",
    "a tag of its own": lambda folder: "seed: !coadvise 3",
    "grows": lambda folder: yaml_bomb(),
    "holds itself": lambda folder: "seed: &a [*a]",
    "is deep": lambda folder: "[" * 1_000,
    "is no text": lambda folder: "seed: \0",
    "unhashable keys": lambda folder: "{[1, 2]: 3}",
    "large": lambda folder: "seed: " + "x" * 2**21,
}


def read_or_refused(path: Path) -> RunConfig | None:
    """The configuration in a file; None if it is refused with one sentence."""
    try:
        return load_config(str(path))
    except UserError as error:
        assert_one_sentence(error, "")
        return None


@pytest.mark.parametrize("what", TEXTS)
def test_a_configuration_is_plain_data_or_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "stranger.yaml"
    path.write_text(TEXTS[what](tmp_path))
    assert read_or_refused(path) is None
    with pytest.raises(UserError):
        read_config(path)
    assert not (tmp_path / "executed").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"seed: \xff\xfe\x00")
    with pytest.raises(UserError, match=r"x\.yaml' is not YAML"):
        load_config(str(tmp_path / "x.yaml"))


VALUES = (
    "!!python/object/apply:os.mkdir [executed]", "../../x", ".nan", "-.inf", "1e400", "9" * 5000, "[" * 400, "&a [*a]",
    "*missing", "null", "{}", "[]", "2001-99-99", "!!binary aGk=", "!!set {a}", "hf-hub:a/b", '"\\ud800"', "? x",
    "yes", "-1", "{a: {b: {c: d}}}",
)  # fmt: skip


@given(st.sampled_from(preset_names()), st.data())
def test_a_changed_configuration_is_read_as_it_is_written_or_refused(
    tmp_path_factory: pytest.TempPathFactory, preset: str, data: st.DataObject
) -> None:
    """One line of a preset gets another value or key, is lost, or stands somewhere else; or some bytes are changed."""
    path, lines = tmp_path_factory.mktemp("preset") / "changed.yaml", preset_text(preset).split("\n")
    one, other = (data.draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    key, _, old = lines[one].partition(":")
    odd, indented = data.draw(st.sampled_from(VALUES)), "  " * (one % 4) + lines[other].lstrip()
    lines[one] = data.draw(st.sampled_from((f"{key}: {odd}", f"{odd}:{old}", "", lines[other], indented)))
    content = "\n".join(lines).encode()
    path.write_bytes(data.draw(damages())(content) if data.draw(st.booleans()) else content)
    config = read_or_refused(path)
    if config is not None:
        path.write_text(config.to_yaml())
        assert read_config(path) == config == parse_config(config.model_dump(mode="json"))
        letters = set(string.ascii_lowercase + string.digits + "_")
        assert all(set(name) <= letters for name in config.teachers), "a token's name is a folder's"


@pytest.mark.parametrize("name", ["../../x", "..", "a.b", "a\nb", "<script>", "Conv", "class", "average", ""])
def test_a_teacher_s_name_is_a_lower_case_word(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.yaml"
    teacher = {name: {"model": "resnet_small"}}
    path.write_text(yaml.safe_dump({"teachers": teacher, "student": {"model": "cit_micro_patch4_32"}}))
    with pytest.raises(UserError, match="a teacher's name is its token's"):
        load_config(str(path))


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "checkpoints", "teachers"])
@pytest.mark.parametrize("target", ["absolute", "relative", "dangling"])
def test_a_link_out_of_a_run_directory_is_refused_and_nothing_written_through_it(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, name: str, target: str
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("precious")
    where = outside / ("folder" if "." not in name else "file" if target != "dangling" else "missing")
    (run / name).symlink_to(where if target != "relative" else os.path.relpath(where, run))
    (run / "config.yaml").write_text(load_config(tiny_preset, source=str(tiny_images)).to_yaml())
    before = contents(outside)
    with pytest.raises(UserError, match=f"{name}' leads out of the run directory"):
        fit(tiny_images, tiny_preset, run)
    assert contents(outside) == before
    assert not (outside / "missing").exists()
    assert not list((outside / "folder").iterdir())


def test_predictions_that_are_damaged_are_named(tmp_path: Path) -> None:
    path = evaluate.predictions_path(tmp_path, "students/alone-0")
    path.parent.mkdir()
    for content in (b"", struct.pack("<Q", 10**12), save({"logits.class": torch.ones(1, 2)})):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match=r"students\.alone-0\.safetensors: "):
            evaluate.load_predictions(tmp_path, "students/alone-0")


def test_a_stranger_s_run_is_evaluated_and_loaded_or_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "students").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: !!python/object/apply:os.getcwd []")
    stranger(run / "students" / "advised-0", model="local-dir:/")
    with pytest.raises(UserError, match=r"config\.yaml' is not YAML"):
        evaluate_run(run)
    with pytest.raises(UserError, match="unknown model 'local-dir:/'"):
        load(run)
