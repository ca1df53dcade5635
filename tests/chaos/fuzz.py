"""The readers of configurations, manifests, weights and states, given what strangers and broken disks may give."""

import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from chaos import Tally
from chaos.mutate import a_configuration, attempt, damaged
from coadvise.config import ModelConfig
from coadvise.errors import UserError
from coadvise.models.network import build_network, load_network
from coadvise.storage import MANIFEST, OWN, STATE, WEIGHTS, DamagedError, read_manifest, write_folder
from coadvise.training.checkpoint import read_state

SMALL = ModelConfig(model="resnet_small", model_kwargs={"widths": [8], "depths": [1], "strides": [2]})
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**12, 1e308, "", "x" * 1000, "hf-hub:a/b", "local-dir:/etc", "../../x", "/etc/passwd", [], {},
    [[[]]], {"checkpoint_path": "/etc/passwd"}, {"pretrained": True}, ["a"] * 5, "\ud800", "resnet18", "<script>",
)  # fmt: skip


def run(tries: int, seed: int, folder: Path) -> Tally:
    """A third of the tries each: configurations, damaged folders, folders that were made to deceive."""
    draw, tally = random.Random(seed), Tally("fuzz")
    folder.mkdir(exist_ok=True)
    network = build_network(SMALL, ["a", "b"], 16, 0)
    about = {**network.about, "made_by": "fuzz"}
    state = {"step": 1, "optimiser": {"state": {0: {"exp_avg": torch.ones(3)}}}, "sums": {"class": torch.ones(())}}
    write_folder(folder / "whole", network.model.state_dict(), state, about)
    for number in range(tries):
        attempt(tally, (a_configuration, a_damaged_folder, a_deceiving_folder)[number % 3], draw, folder)
    return tally


def a_damaged_folder(draw: random.Random, folder: Path) -> str:
    """Bytes of one file changed, as disks do: always found, unless the file is the same or says the same."""
    model = _copy(folder)
    name = draw.choice((WEIGHTS, STATE, MANIFEST))
    before = (model / name).read_bytes()
    after = damaged(before, draw)
    (model / name).write_bytes(after)
    fault = ""
    try:
        read_manifest(model)
    except DamagedError as error:
        fault = str(error)
    if fault:
        assert str(model) in fault, "the file is not named"
        return "damage found"
    assert before == after or (name == MANIFEST and json.loads(before) == json.loads(after)), f"damage of {name} missed"
    return "nothing changed"


def a_deceiving_folder(draw: random.Random, folder: Path) -> str:
    """Weights, state or manifest are others, and all checksums are right."""
    model = _copy(folder)
    manifest = json.loads((model / MANIFEST).read_text())
    manifest.pop(OWN)
    name = draw.choice((WEIGHTS, STATE, MANIFEST))
    if name == MANIFEST:
        _deceive(manifest, draw)
    elif name == STATE and draw.random() < 0.5:
        (model / STATE).write_bytes(_malicious(folder, draw))
    else:
        (model / name).write_bytes(damaged((model / name).read_bytes(), draw))
    for each, entry in manifest["files"].items() if isinstance(manifest.get("files"), dict) else ():
        if each in (WEIGHTS, STATE) and isinstance(entry, dict):
            content = (model / each).read_bytes()
            entry.update({"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    manifest.pop(OWN, None)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (model / MANIFEST).write_text(json.dumps({**manifest, OWN: digest}))
    load_network(model)
    try:
        read_state(model)
    except DamagedError as error:
        raise UserError(str(error)) from None
    return "folders read"


def _deceive(manifest: dict[str, Any], draw: random.Random) -> None:
    """Something else, or nothing, at a random place of a manifest."""
    place: Any = manifest
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.6:
            place = inner
            continue
        if isinstance(place, dict) and draw.random() < 0.2:
            del place[key]
        else:
            place[key] = draw.choice(ODD)
        return


class _Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder / "executed"),)


def _malicious(folder: Path, draw: random.Random) -> bytes:
    path = folder / "malicious"
    if draw.random() < 0.3:
        return pickle.dumps(_Malicious(folder), protocol=draw.randrange(6))
    torch.save({"step": _Malicious(folder)}, path, _use_new_zipfile_serialization=draw.random() < 0.5)
    return damaged(path.read_bytes(), draw) if draw.random() < 0.5 else path.read_bytes()


def _copy(folder: Path) -> Path:
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(folder / "whole", model)
    return model
