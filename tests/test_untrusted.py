"""Runs, models and configurations that come from strangers: nothing is executed, fetched, or written elsewhere."""

import ast
import hashlib
import io
import json
import os
import pickle
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save
from tiny import contents

import coadvise
from coadvise import fit, load
from coadvise.config import ModelConfig, load_config, read_config
from coadvise.errors import UserError
from coadvise.evaluation import scores as evaluate
from coadvise.models.network import build_network, load_network
from coadvise.runs.evaluate import evaluate_run
from coadvise.storage import FORMAT, MANIFEST, OWN, STATE, WEIGHTS, DamagedError, write_folder
from coadvise.training.checkpoint import Checkpoints, read_state
from coadvise.training.loop import _resume

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


# The source


def calls(tree: ast.AST) -> dict[str, list[ast.Call]]:
    """Every call by the dotted name that is called."""
    found: dict[str, list[ast.Call]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            found.setdefault(ast.unparse(node.func), []).append(node)
    return found


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "runpy"}
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "np.load", "numpy.load", "joblib.load", "torch.hub.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.jit.load", "torch.package.PackageImporter",
}  # fmt: skip


def faults(source: str) -> list[str]:
    """What in a module could execute what is in a file."""
    tree = ast.parse(source)
    called = calls(tree)
    found = sorted(FORBIDDEN & called.keys())
    found += sorted(name for name in imports(tree) if name.partition(".")[0] in UNPICKLERS)
    found += sorted(name for name in imports(tree) if name in ("torch.load", "yaml.load", "torch.hub"))
    for call in called.get("torch.load", ()):
        safe = {word.arg: ast.unparse(word.value) for word in call.keywords}.get("weights_only")
        if safe != "True":
            found.append(f"torch.load with weights_only={safe}")
    for name, each in called.items():
        if name.startswith("subprocess.") and any(w.arg == "shell" for call in each for w in call.keywords):
            found.append(f"{name} with a shell")
    return found


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 40
    assert {str(path): found for path in modules if (found := faults(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=safe)",
        "from torch import load", "import pickle", "from pickle import loads", "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)", "subprocess.run(text, shell=True)", "np.load(path, allow_pickle=True)", "import joblib",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert faults(line)
    assert not faults("state = torch.load(path, map_location='cpu', weights_only=True); yaml.safe_load(text)")


# Checkpoints


def sealed(folder: Path, **files: bytes) -> Path:
    """A folder whose manifest fits its files: made by a stranger, not damaged."""
    weights = files.pop("weights", save({"w": torch.ones(2)}))
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, {"w": torch.ones(2)}, {"step": 1}, {})
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, content in ((WEIGHTS, weights), (STATE, files.pop("state", (folder / STATE).read_bytes()))):
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.pop(OWN, None)
    (folder / MANIFEST).write_text(resealed({**manifest, "format": FORMAT}))
    return folder


def resealed(manifest: dict[str, Any]) -> str:
    """The manifest's text; the checksum of itself is as easily made by a stranger."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, OWN: digest})


def malicious_states(folder: Path) -> dict[str, bytes]:
    """Files that would make a folder: as PyTorch's zip, as its old format, as plain pickle."""
    zipped, old = folder / "zipped", folder / "old"
    torch.save({"step": 1, "x": Malicious(folder / "executed")}, zipped)
    torch.save({"step": 1, "x": Malicious(folder / "executed")}, old, _use_new_zipfile_serialization=False)
    plain = pickle.dumps(Malicious(folder / "executed"), protocol=2)
    return {"zipped": zipped.read_bytes(), "old": old.read_bytes(), "plain": plain, "list": _saved([1, 2])}


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zipped", "old", "plain", "list"])
def test_a_state_that_would_run_code_ends_the_run_in_one_sentence(tmp_path: Path, kind: str) -> None:
    sealed(tmp_path / "checkpoints" / "step-00000001", state=malicious_states(tmp_path)[kind])
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    folder, found = checkpoints.latest()
    assert folder is not None
    assert not found  # by its checksums it is whole
    network = torch.nn.Module()
    network.model = torch.nn.ParameterDict({"w": torch.zeros(2)})
    optimiser = torch.optim.AdamW(network.parameters())
    with pytest.raises(UserError, match=r"part: .*state\.pt: .*; remove '.*step-00000001' to go on"):
        _resume("part", network, optimiser, None, None, checkpoints, None)
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
    sealed(tmp_path / "model", weights=content)
    with pytest.raises(UserError, match=r"damaged model: .*model\.safetensors"):
        load_network(tmp_path / "model")


ABOUT = {
    "model": "resnet_small", "model_kwargs": {"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]},
    "classes": ["a", "b"], "image_size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}  # fmt: skip


def stranger(folder: Path, drop: str = "", **changes: Any) -> Path:
    """A model folder whose files are what they were and whose manifest says something else, checksums right."""
    network = build_network(ModelConfig(model="resnet_small", model_kwargs=ABOUT["model_kwargs"]), ["a", "b"], 16, 0)
    write_folder(folder, network.model.state_dict(), None, ABOUT)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop(OWN, None)
    manifest = {key: value for key, value in {**manifest, **changes}.items() if key != drop}
    (folder / MANIFEST).write_text(resealed(manifest))
    return folder


def test_the_stranger_s_model_is_good_before_it_is_changed(tmp_path: Path) -> None:
    assert load_network(stranger(tmp_path / "model")).classes == ("a", "b")


@pytest.mark.parametrize(
    "name",
    ["hf-hub:someone/model", "hf_hub:someone/model", "local-dir:/etc", "../../model", "/etc/passwd", "resnet18\0", ""],
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
    with pytest.raises(UserError, match=f"may not hold {next(iter(arguments))}; leave that out"):
        load_network(stranger(tmp_path / "model", model_kwargs={**ABOUT["model_kwargs"], **arguments}))
    with pytest.raises(UserError, match="may not hold"):
        build_network(ModelConfig(model="resnet_small", model_kwargs=arguments), ["a", "b"], 16, 0)


@pytest.mark.parametrize("key", ABOUT)
def test_a_manifest_without_one_of_its_keys_describes_no_network(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}': Field required; it describes no network"):
        load_network(stranger(tmp_path / "model", drop=key))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ["resnet_small"]}, {"classes": []}, {"classes": [1, 2]}, {"classes": "ab"}, {"image_size": 10**9},
        {"image_size": "16"}, {"mean": [0, 0]}, {"mean": [1e999] * 3}, {"std": [0.0] * 3}, {"model_kwargs": None},
        {"model_kwargs": {"widths": "many"}}, {"model_kwargs": {"widths": [8, -16], "depths": [1, 1]}},
        {"classes": ["a", "b", "c"]}, {"model": "resnet18", "model_kwargs": {}},
    ],
)  # fmt: skip
def test_a_manifest_of_another_network_or_none_is_one_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        load_network(stranger(tmp_path / "model", **changes))
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../../x", "x: missing"),
        ("/etc/passwd", "passwd: missing"),
        ("other", "other: missing"),
        (None, "names no mod"),
    ],
)
def test_a_manifest_s_files_are_those_of_its_folder(tmp_path: Path, name: str | None, says: str) -> None:
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    weights = json.loads((stranger(tmp_path / "good") / MANIFEST).read_text())["files"]
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(UserError, match=says):
        load_network(stranger(tmp_path / "model", files={} if name is None else {**weights, name: entry}))


# Configurations


def yaml_bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(lines)


TEXTS: dict[str, Callable[[Path], str]] = {
    "runs a function": lambda folder: f'seed: !!python/object/apply:os.mkdir ["{folder}/executed"]',
    "runs a module": lambda folder: f'!!python/object/new:os.mkdir ["{folder}/executed"]',
    "imports": lambda folder: "!!python/module:antigravity",
    "a name": lambda folder: "seed: !!python/name:os.system",
    "a tag of its own": lambda folder: "seed: !coadvise 3",
    "grows": lambda folder: yaml_bomb(),
    "holds itself": lambda folder: "seed: &a [*a]",
    "is deep": lambda folder: "[" * 5_000,
    "is no text": lambda folder: "seed: \0",
    "a date of no calendar": lambda folder: "seed: 2001-99-99",
    "a list": lambda folder: "- seed",
    "unhashable keys": lambda folder: "{[1, 2]: 3}",
    "large": lambda folder: "seed: " + "x" * 2**21,
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_configuration_is_plain_data_or_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "stranger.yaml"
    path.write_text(TEXTS[what](tmp_path))
    for read in (lambda: load_config(str(path)), lambda: read_config(path)):
        with pytest.raises(UserError) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 2000
    assert not (tmp_path / "executed").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"seed: \xff\xfe\x00")
    with pytest.raises(UserError, match=r"x\.yaml' is not YAML"):
        load_config(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    "name", ["../../x", "/etc", "a/b", "..", ".", "a.b", "a\nb", "<script>", "Conv", "class", "average", "", "type"]
)
def test_a_teacher_s_name_is_a_word_since_folders_and_parameters_are_called_after_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.yaml"
    teacher = {name: {"model": "resnet_small"}}
    path.write_text(yaml.safe_dump({"teachers": teacher, "student": {"model": "cit_micro_patch4_32"}}))
    with pytest.raises(UserError, match="a teacher's name is its token's"):
        load_config(str(path))


# Run directories


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "checkpoints", "teachers", "quarantine.txt"])
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


def test_a_state_is_a_dictionary(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(_saved([1, 2]))
    with pytest.raises(DamagedError, match=r"holds list, not a training state"):
        read_state(tmp_path)
