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
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import contents, damages, seal
from torch import Tensor

import coadvise
from coadvise import fit, load
from coadvise.config.reading import load_config, parse_config, preset_names, preset_text, read_config
from coadvise.config.schema import ModelConfig, RunConfig
from coadvise.errors import UserError
from coadvise.models.network import build_network, load_network
from coadvise.runs.evaluate import evaluate_run
from coadvise.storage import MANIFEST, STATE, WEIGHTS, write_folder
from coadvise.training.checkpoint import Checkpoints, TrainingState


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
    modules = sorted(Path(coadvise.__file__).parent.rglob("*.py"))
    assert len(modules) > 40
    assert {str(path): found for path in modules if (found := FORBIDDEN.search(path.read_text()))} == {}


def assert_one_sentence(error: Exception, names: Path | str) -> None:
    assert str(names) in str(error)
    assert "\n" not in str(error)
    assert 0 < len(str(error)) < 2000


@cache
def good_weights() -> dict[str, Tensor]:
    return build_network(TINY, ["a", "b"], 16, 0).model.state_dict()


def deceiving(folder: Path, weights: bytes | None = None, state: bytes | None = None, **changes: Any) -> Path:
    """A model or checkpoint of something else, whose manifest has right checksums: from a stranger, not damaged."""
    folder.parent.mkdir(exist_ok=True)
    write_folder(folder, good_weights(), {"step": 1}, ABOUT)
    manifest = {**json.loads((folder / MANIFEST).read_text()), **changes}
    for name, content in ((WEIGHTS, weights), (STATE, state)):
        if content is not None:
            (folder / name).write_bytes(content)
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(folder, manifest)
    return folder


@pytest.mark.parametrize("kind", ["zipped", "old", "plain", "list"])
def test_a_state_that_would_run_code_ends_the_run_with_one_sentence(tmp_path: Path, kind: str) -> None:
    file, malicious = io.BytesIO(), Malicious(tmp_path / "executed")
    if kind == "plain":
        pickle.dump(malicious, file, protocol=2)
    else:
        state = [1, 2] if kind == "list" else {"step": 1, "x": malicious}
        torch.save(state, file, _use_new_zipfile_serialization=kind != "old")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    deceiving(tmp_path / "checkpoints" / "step-00000001", state=file.getvalue())
    assert not checkpoints.latest()[1], "by its checksums it is whole"
    nothing: Any = None
    with pytest.raises(UserError, match=r"part: .*state\.pt: .*; remove '.*step-00000001' to go on"):
        TrainingState(nothing, nothing, nothing, nothing).restore("part", checkpoints, print)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 10**12) + b"{}",
        b'{"w":{"dtype":"F32","shape":[250000000000],"data_offsets":[0,1000000000000]}}',
        b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        pickle.dumps({"w": 1}),
    ],
)
def test_weights_that_claim_too_much_are_refused_before_memory_is_taken(tmp_path: Path, header: bytes) -> None:
    content = struct.pack("<Q", len(header)) + header + bytes(4) if header.startswith(b"{") else header
    with pytest.raises(UserError, match=r"damaged model: .*model\.safetensors"):
        load_network(deceiving(tmp_path / "model", weights=content))


TINY = ModelConfig(model="resnet_small", model_kwargs={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]})
ABOUT: dict[str, Any] = {
    "model": TINY.model, "model_kwargs": TINY.model_kwargs,
    "classes": ["a", "b"], "image_size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}  # fmt: skip


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/etc", "../../model", ""])
def test_a_model_s_name_is_one_of_timm_s_registry_and_no_place(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="unknown model"):
        load_network(deceiving(tmp_path / "model", model=name))
    with pytest.raises(UserError, match="unknown model"):
        build_network(ModelConfig(model=name), ["a", "b"], 16, 0)


@pytest.mark.parametrize(
    "arguments",
    [{"checkpoint_path": "/x"}, {"pretrained": True}, {"pretrained_cfg": {"url": "https://localhost/x"}},
     {"pretrained_cfg_overlay": {"file": "/x"}}, {"cache_dir": "/x"}, {"num_classes": 7}],
)  # fmt: skip
def test_a_model_s_arguments_open_and_fetch_nothing(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"must not contain {next(iter(arguments))}"):
        load_network(deceiving(tmp_path / "model", model_kwargs={**ABOUT["model_kwargs"], **arguments}))
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
    folder = deceiving(tmp_path_factory.mktemp("stranger") / "model")
    if data.draw(st.integers(0, 3)):
        manifest = json.loads((folder / MANIFEST).read_text())
        change_somewhere(manifest, data)
        seal(folder, manifest)
    else:
        deceiving(folder, weights=data.draw(damages())((folder / WEIGHTS).read_bytes()))
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


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd"])
def test_a_manifest_s_files_are_those_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"x")
    folder = deceiving(tmp_path / "model")
    assert load_network(folder).classes == ("a", "b"), "it is good before it is changed"
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    seal(folder, manifest)
    with pytest.raises(UserError, match=f"{name}: missing"):
        load_network(folder)


BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 13))])


def read_or_refused(path: Path) -> RunConfig | None:
    """The configuration in a file; None if it is refused with one sentence."""
    try:
        return load_config(str(path))
    except UserError as error:
        assert_one_sentence(error, "")
        return None


@pytest.mark.parametrize(
    "text",
    ["seed: !!python/object/apply:os.mkdir [executed]", "!!python/module:antigravity", "seed: !coadvise 3", BOMB,
     "seed: &a [*a]", "[" * 1_000, "seed: \0", "{[1, 2]: 3}", "seed: " + "x" * 2**21],
    ids=["function", "import", "tag", "bomb", "loop", "deep", "no text", "unhashable", "large"],
)  # fmt: skip
def test_a_configuration_is_plain_data_or_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stranger.yaml"
    path.write_text(text)
    assert read_or_refused(path) is None
    with pytest.raises(UserError):
        read_config(path)
    assert not Path("executed").exists()


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


@pytest.mark.parametrize("name", ["../../x", "..", "a\nb", "<script>", "Conv", "class", ""])
def test_a_teacher_s_name_is_a_lower_case_word(name: str) -> None:
    with pytest.raises(UserError, match=f"'teachers.{re.escape(name)}' is "):
        parse_config({"teachers": {name: {"model": "resnet_small"}}, "student": {"model": "cit_micro_patch4_32"}})


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "checkpoints", "teachers"])
def test_a_link_out_of_a_run_directory_is_refused_and_nothing_written_through_it(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, name: str
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (outside / "file").write_text("precious")
    (run / "config.yaml").write_text(load_config(tiny_preset, source=str(tiny_images)).to_yaml())
    before = contents(outside)
    for target in (outside, Path("../outside/file"), outside / "missing"):
        (run / name).symlink_to(target)
        with pytest.raises(UserError, match=f"{name}' leads out of the run directory"):
            fit(tiny_images, tiny_preset, run)
        (run / name).unlink()
    assert contents(outside) == before


def test_a_stranger_s_run_is_evaluated_and_loaded_or_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "students").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: !!python/object/apply:os.getcwd []")
    deceiving(run / "students" / "advised-0", model="local-dir:/")
    with pytest.raises(UserError, match=r"config\.yaml' is not YAML"):
        evaluate_run(run)
    with pytest.raises(UserError, match="unknown model 'local-dir:/'"):
        load(run)
