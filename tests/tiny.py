"""Runs small enough for a test: a made image folder, a preset of tiny networks, ways to start and to compare runs."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from coadvise.storage import MANIFEST, OWN
from coadvise.training.listener import Silent

CLASSES = ("blue", "green", "red")

# Two networks with batch norm as teachers and a student without it, each trained for 4 steps.
PRESET = """\
data: {image_size: 16}
augment: {kind: light, smoothing: 0.1}
teachers:
  conv:
    model: resnet_small
    model_kwargs: {widths: [8, 16], depths: [1, 1], strides: [2, 2]}
    recipe: &recipe {epochs: 2, batch_size: 12, warmup_epochs: 0.5, evaluations: 2}
  inv:
    model: rednet_small
    model_kwargs: {widths: [64, 64], depths: [1, 1], strides: [2, 2], kernel_size: 3}
    recipe: *recipe
student:
  model: cit_micro_patch4_32
  model_kwargs: {embed_dim: 24, depth: 1}
  recipe: *recipe
engine: {checkpoint_seconds: 0}
"""

# What the demo shows of a run with its baseline: the part and the answer behind each opinion.
OPINIONS = {
    "conv teacher": ("teachers/conv", "class"),
    "involution teacher": ("teachers/inv", "class"),
    "class token": (None, "class"),
    "conv token": (None, "conv"),
    "inv token": (None, "inv"),
    "average": (None, "average"),
}

ONE_EPOCH = [f"{part}.recipe.epochs=1" for part in ("teachers.conv", "teachers.inv", "student")]


def make_images(root: Path, train: int = 8, val: int = 4, size: int = 16, classes: Sequence[str] = CLASSES) -> Path:
    """Writes root/train/CLASS/*.png and root/val/CLASS/*.png: noise tinted by the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 160, (size, size, 3), dtype=np.uint8)
                pixels[..., label % 3] += 80
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def without_batch_norm() -> str:
    """The preset without batch norm, whose statistics are a process's own: two processes compute what one does."""
    values = yaml.safe_load(PRESET)
    for teacher in values["teachers"].values():
        teacher["model"] = "vit_tiny_patch16_224"
        teacher["model_kwargs"] = {"patch_size": 4, "embed_dim": 24, "depth": 1}
    return yaml.safe_dump(values)


def write_preset(folder: Path, text: str = PRESET) -> str:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return str(path)


class Stopper(Silent):
    """A listener that asks for a stop, as Ctrl-C or a batch system does, after given steps of given networks."""

    def __init__(self, stop_at: Callable[[str, int], bool]) -> None:
        self.stop_at = stop_at
        self.steps: list[tuple[str, int]] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.steps.append((part, done))
        if self.stop_at(part, done):
            request_stop()


def request_stop() -> None:
    assert callable(signal.getsignal(signal.SIGTERM)), "nobody would catch the signal"
    os.kill(os.getpid(), signal.SIGTERM)


def never(part: str, step: int) -> bool:
    return False


def records(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The run's records of some kinds (all when none are given), without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if not kinds or line["kind"] in kinds]
    for line in chosen:
        for key in ("images_per_second", "time", "command"):
            line.pop(key, None)
        for row in line.get("rows", ()):
            row.pop("images_per_second")
    return chosen


def weights_of(run: Path, part: str) -> dict[str, Tensor]:
    return load_file(run / part / "model.safetensors")


def assert_same_weights(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(got[name], wanted[name])]
    assert not different, f"{len(different)} of {len(wanted)} differ, first {different[:3]}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments: str | Path, launcher: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "coadvise", *map(str, arguments)]


def run_program(*arguments: str | Path, launcher: Sequence[str] = (), cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Runs `python -m coadvise`, as a user would, to its end."""
    return subprocess.run(command(*arguments, launcher=launcher), cwd=cwd, capture_output=True, text=True, timeout=900)


class CrashError(Exception):
    """Stands for a kill."""


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


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a manifest with the checksum of its own contents, as easily made by a stranger."""
    rest = {key: value for key, value in manifest.items() if key != OWN}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**rest, OWN: digest}))


WORDS = (b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"<!DOCTYPE html>", b"IHDR", b"\x89PNG", b"null", b"-1", b'"')


def damages() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """Changes of some bytes in one to three places: flipped, overwritten, cut off, doubled or lost."""

    def changed(content: bytes, changes: Sequence[tuple[int, int, int, bytes]]) -> bytes:
        for kind, place, length, word in changes:
            start = place % (len(content) + 1)
            end = min(len(content), start + length)
            content = (
                content[:start] + bytes(byte ^ length for byte in content[start : start + 1]) + content[start + 1 :],
                content[:start] + word + content[start + len(word) :],
                content[:start],
                content[:end] + content[start:],
                content[:start] + content[end:],
            )[kind]
        return content

    change = st.tuples(st.integers(0, 4), st.integers(0, 10**6), st.integers(1, 64), st.sampled_from(WORDS))
    several = st.lists(change, min_size=1, max_size=3)
    return several.map(lambda changes: lambda content: changed(content, changes))


def assert_same_run(one: Path, other: Path, parts: Sequence[str]) -> None:
    """Equal weights and records of each network, and the same verdict."""
    for part in parts:
        assert_same_weights(weights_of(one, part), weights_of(other, part))
        for kind in ("train", "eval", "result"):
            got, wanted = ([r for r in records(run, kind) if r["part"] == part] for run in (one, other))
            assert got == wanted
    assert records(one, "verdict") == records(other, "verdict")
