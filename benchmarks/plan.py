"""What `coadvise plan` foresees of a step, against steps of training: three networks, sizes of images and batches.

`python -m benchmarks.plan [--repeats N] [--json FILE] [--calibration FILE]`. The networks are those of the preset
photos-small: its convolution teacher, its involution teacher, its student alone. A calibration, which is of other
networks, is measured in turns with them, so that other work on the machine meets both; `--calibration` writes it.
Measured are steps of the loop of `fit` itself (views, loss, clipping, update, averaged weights), in bfloat16 where the
processor has it, on one thread, as `fit` has it for each of several networks. Seconds are the process's own; figures
are the fastest steps', as a calibration's are. The goal is 20 % in every row.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import coadvise.torchvision_guard  # noqa: F401
from benchmarks.table import Setting, machine
from coadvise.advice import LossWeights
from coadvise.config.reading import load_config
from coadvise.config.schema import RecipeConfig
from coadvise.costs.calibrate import line_through, precisions, steps, view_seconds
from coadvise.costs.foresee import Question, network_of, with_pixels
from coadvise.costs.gpus import gpu_named
from coadvise.costs.machine import HALF, PCIE, Calibration, Target, of_calibration, of_sheet, save, this_device
from coadvise.costs.rates import Timed, fit
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources.folder import FolderSplit
from coadvise.data.views import Views
from coadvise.distill.loss import CoAdvice
from coadvise.distill.teachers import Teachers
from coadvise.runs.network_job import initial_network
from coadvise.runs.plan import ALONE, TEACHER, Part
from coadvise.training.checkpoint import Checkpoints
from coadvise.training.engine import Engine
from coadvise.training.loop import Training, train
from coadvise.training.metrics import Recorder

PRESET, CLASSES, GOAL = "photos-small", 10, 0.2
PARTS = (
    Part("teachers/conv", TEACHER, 0, "conv"),
    Part("teachers/inv", TEACHER, 0, "inv"),
    Part("students/alone-0", ALONE, 0),
)
SIZES, BATCHES, SKIP = (64, 128, 224), (8, 32, 64), 2


def asked(pixels: int, batch: int, target: Target | None = None) -> Question:
    """The preset at another size and batch, on one thread of this machine; without a target only its configuration."""
    networks = ("teachers.conv", "teachers.inv", "student")
    overrides = [f"{network}.recipe.batch_size={batch}" for network in networks]
    config = with_pixels(load_config(PRESET, overrides), pixels)
    return Question(config, 100_000, CLASSES, target or of_sheet(gpu_named("H100"), None), 0)


def measured(asked: Question, part: Part, repeats: int) -> float:
    """Seconds of the process for a step of training, the fastest."""
    config, size = asked.config, asked.config.data.image_size
    recipe: RecipeConfig = (config.teachers[part.teacher] if part.role == TEACHER else config.student).recipe
    count = (repeats + SKIP + 1) * recipe.batch_size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, count)
    split = ScannedSplit(FolderSplit(Path(), (), labels), labels, pixels, (), Counter({(size, size): count}))
    augment = (part.role == TEACHER and config.teachers[part.teacher].augment) or config.augment
    classes = tuple(str(number) for number in range(CLASSES))
    times = list[float]()

    def progress(name: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        times.append(time.process_time())

    with Engine(config.engine) as engine, tempfile.TemporaryDirectory() as folder:
        job = Training(
            part.name, 0, initial_network(part, config, classes),
            recipe.model_copy(update={"epochs": 1, "evaluations": 1, "warmup_epochs": 0}),
            Views(split, augment, CLASSES, size, seed=0), Teachers({}), CoAdvice(LossWeights()),
            evaluate=lambda network, step: {"class": 0.0}, workers=0, checkpoint_seconds=1e9,
        )  # fmt: skip
        record = Recorder(Path(folder), write=False, say=lambda text: None)
        train(job, Checkpoints(Path(folder, "checkpoints")), engine, record, progress)
    return float(np.diff(times)[SKIP - 1 : -1].min())  # the last has the evaluation


def compare(repeats: int) -> tuple[list[dict[str, Any]], Calibration]:
    """Every network at every size and batch, and the calibration that was made in between."""
    precision = precisions(gpu=False)[0]
    calibrating, timed, took = steps(precision == HALF, gpu=False), list[Timed](), list[float]()
    rows = list(itertools.product(SIZES, BATCHES, PARTS))
    for pixels, batch, part in rows:
        timed.extend(itertools.islice(calibrating, 1))
        took.append(measured(asked(pixels, batch), part, repeats))
        print(f"{part.name} {pixels} {batch}: {1e3 * took[-1]:.1f} ms", file=sys.stderr, flush=True)
    timed.extend(calibrating)
    name, gpu, memory = this_device()
    views = {kind: line_through(seconds) for kind, seconds in view_seconds().items()}
    found = Calibration(name, gpu, memory, {f"{precision}, 1": fit(timed, overlapped=False)}, views)
    target = of_calibration(found, PCIE)
    return [row(target, *which, took=seconds) for which, seconds in zip(rows, took, strict=True)], found


def row(target: Target, pixels: int, batch: int, part: Part, took: float) -> dict[str, Any]:
    """One comparison."""
    foreseen = network_of(asked(pixels, batch, target), part, threads=1).seconds
    named = {"network": part.title.removesuffix(" (seed 0)"), "pixels": pixels, "batch": batch}
    return {**named, "foreseen_ms": 1e3 * foreseen, "measured_ms": 1e3 * took, "ratio": foreseen / took}


def line(one: Mapping[str, Any]) -> str:
    """A row as docs/PERFORMANCE.md has it."""
    mark = "!" * (abs(one["ratio"] - 1) > GOAL)
    times = f"{one['foreseen_ms']:10.1f}{one['measured_ms']:10.1f}{one['ratio']:8.2f}{mark}"
    return f"{one['network']:20}{one['pixels']:>7}{one['batch']:>7}{times}"


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table, and how far it is off."""
    yield f"{'':20}{'pixels':>7}{'batch':>7}{'foreseen':>10}{'measured':>10}{'ratio':>8}  ms a step"
    yield from map(line, rows)
    off = [abs(row["ratio"] - 1) for row in rows]
    yield f"off by {max(off):.0%} at most, {sum(off) / len(off):.0%} on average"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    rows, calibration = compare(given.repeats)
    if given.calibration is not None:
        save(calibration, given.calibration)
    print("\n".join(lines(rows)))
    print(f"other work on the machine: load {before:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end")
    if given.json is not None:
        about = {**machine(Setting(torch.device("cpu"), "bfloat16")), "load": [before, os.getloadavg()[0]]}
        given.json.write_text(json.dumps({"about": about, "goal": GOAL, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
