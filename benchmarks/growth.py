"""How the cost of training grows with images, epochs, classes, resolution and teachers.

One thing at a time is made larger, in three sizes, from a common base: 256 images of 32 pixels, 10 classes, one epoch,
no teacher, the student cit_micro_patch4_32. Each figure is the time of a whole `coadvise.train.train`, views, optimiser
and scoring included, as a median over interleaved repeats (at most three: a training is long enough). A power of the
size is fitted to images, epochs, classes and resolution (in pixels a side), a straight line to teachers (the preset's
convolution teacher, so many times over).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.step import BATCH_SIZE, random_split, training
from benchmarks.table import Row, Setting, Table, machine
from coadvise.advice import Advice, LossWeights
from coadvise.config import EngineConfig, ModelConfig, RecipeConfig, load_config
from coadvise.data.views import Views
from coadvise.distill.teachers import Teacher, Teachers
from coadvise.evaluation.speed import interleaved
from coadvise.models import TokenModel
from coadvise.models.network import build_network
from coadvise.training.engine import Engine


@dataclass(frozen=True)
class _Case:
    """A training to be timed; `images` is in batches."""

    images: int = 4
    epochs: int = 1
    classes: int = 10
    resolution: int = 32
    teachers: int = 0


SIZES = {
    "images": (2, 4, 8),
    "epochs": (1, 2, 4),
    "classes": (10, 100, 1000),
    "resolution": (16, 32, 64),
    "teachers": (0, 1, 2, 4),
}


def run(setting: Setting) -> Table:
    """Times every case, and fits how the time grows."""
    device = "cuda" if setting.device.type == "cuda" else "cpu"
    engine = Engine(EngineConfig(device=device, precision=setting.precision, compile=setting.compile))
    batch_size = setting.batch_size or BATCH_SIZE
    cases = {replace(_Case(), **{what: size}) for what, sizes in SIZES.items() for size in sizes}
    calls = {str(case): _training(case, batch_size, engine) for case in sorted(cases, key=str)}
    seconds = interleaved(calls, min(setting.repeats, 3), engine.synchronise)
    rows, notes = [], []
    for what, sizes in SIZES.items():
        times = [seconds[str(replace(_Case(), **{what: size}))] for size in sizes]
        shown = [size * batch_size for size in sizes] if what == "images" else sizes
        rows += [Row(f"{what} {size}", "ms", 1e3 * t) for size, t in zip(shown, times, strict=True)]
        if what == "teachers":
            slope, base = np.polyfit(sizes, times, 1)
            notes.append(f"teachers: each adds {slope / base:.2f} of the time without")
        else:
            power, _ = np.polyfit(np.log(sizes), np.log(times), 1)
            notes.append(f"{what}: time grows with the power {power:.2f} of them")
    about = {
        **machine(setting),
        "batch": batch_size,
        "layout": "channels-last",
        "mode": "training",
        "student": "cit_micro_patch4_32",
    }
    return Table("how the time of a training grows", "peer", rows, about, notes)


def _training(case: _Case, batch_size: int, engine: Engine) -> Callable[[], object]:
    config = load_config("small-images")
    names = tuple(f"class {n}" for n in range(case.classes))
    tokens = tuple(f"conv{n}" for n in range(case.teachers)) or ("conv",)
    split = random_split(case.images * batch_size, case.resolution, case.classes)
    views = Views(split, config.augment, case.classes, case.resolution, seed=0)
    recipe = RecipeConfig(epochs=case.epochs, batch_size=batch_size, warmup_epochs=0, clip=1.0, evaluations=1)
    teachers = {}
    for n in range(case.teachers):
        network = build_network(config.teachers["conv"], names, case.resolution, seed=n)
        teachers[tokens[n]] = Teacher(tokens[n], network, names)
        engine.prepare(teachers[tokens[n]])
    weights = LossWeights(1.0, {name: Advice() for name in teachers})
    student = ModelConfig(model="cit_micro_patch4_32")

    def call() -> object:
        network = build_network(student, names, case.resolution, seed=0, tokens=tokens)
        assert isinstance(network.model, TokenModel)
        if not teachers:
            network.model.freeze_advised_heads()
        return training(network, recipe, views, Teachers(teachers), weights, engine)(lambda *progress: None)

    return call
