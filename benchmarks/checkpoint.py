"""A checkpoint against one plain `torch.save`: the cost of atomic writes and checksums, and its share of training.

Ours writes weights, AdamW's state and averaged weights, computes the sha256 of each file, waits until all is on disk
and removes the oldest checkpoint. The peer writes the same tensors into one file: no checksum, no waiting for the disk,
no older copy kept. They take turns; figures are medians, on the disk of the temporary folder (TMPDIR). The floor is the
same number of bytes written to one file and waited for. The share is that of a run with the preset's
`engine.checkpoint_seconds`.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import Row, Setting, Table, machine
from coadvise.config.reading import load_config
from coadvise.evaluation.speed import interleaved
from coadvise.models.network import build_network
from coadvise.training.checkpoint import KEEP, WRITING_SHARE, Checkpoints
from coadvise.training.optim import make_optimiser

CLASSES = [str(number) for number in range(10)]


def training_state(preset: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and training state of a preset's student after one step."""
    config = load_config(preset)
    network = build_network(config.student, CLASSES, config.data.image_size, seed=0, tokens=config.tokens)
    optimiser = make_optimiser(network.model, config.student.recipe)
    for parameter in network.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimiser.step()
    weights = network.model.state_dict()
    average = {name: value.clone() for name, value in weights.items()} if config.student.recipe.ema else None
    return weights, {"step": 1, "optimiser": optimiser.state_dict(), "ema": average, "sums": {}}


def compare(preset: str, setting: Setting) -> tuple[Row, str]:
    """The row of one preset's student, and a note with its share of training time."""
    weights, state = training_state(preset)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder, "checkpoints"))
        plain, raw = Path(folder, "plain.pt"), Path(folder, "raw")
        steps = iter(range(1, 1_000_000))

        def write_bytes() -> None:
            with raw.open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())

        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: checkpoints.save(next(steps), weights, state),
            "peer": lambda: torch.save({"model": weights, **state}, plain),
            "check": checkpoints.latest,
            "floor": write_bytes,
        }
        for _ in range(KEEP):
            calls["ours"]()
        content = bytes(sum(path.stat().st_size for path in checkpoints.folder.glob("*-*/*")) // KEEP)
        seconds = interleaved(calls, setting.repeats, setting.synchronise)
    interval = max(load_config(preset).engine.checkpoint_seconds, WRITING_SHARE * seconds["ours"])
    share = seconds["ours"] / (interval + seconds["ours"])
    note = (
        f"{preset}: {len(content) / 1e6:.3g} MB; {share:.2%} of training time at one every {interval:.3g} s "
        f"(goal: under 2 %); {1000 * seconds['check']:.3g} ms to check it on resume"
    )
    return Row(preset, "ms", *(1000 * seconds[name] for name in ("ours", "peer", "floor"))), note


def run(setting: Setting) -> Table:
    """Times the students of two presets; with a given batch size, only the smaller one."""
    presets = ("small-images",) if setting.batch_size else ("small-images", "photos")
    rows, notes = zip(*(compare(preset, setting) for preset in presets), strict=True)
    return Table("a checkpoint against torch.save", "torch.save", rows, machine(setting), notes)
