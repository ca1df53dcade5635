"""A training step advised from a logit cache against the same student's step without teachers.

All are `coadvise.train.train` with the preset small-images: cit_micro_aligned_patch4_32 without teachers, advised by
what its two teachers said, read from a cache that is made here, and advised by the teachers themselves. They take turns
within one process, a step (on CUDA 20 steps) each; figures are medians. A cache is read a shard an epoch; what that
takes is not in a step, but in the notes. The floor is a step's arithmetic, as in `bench step`.

The last rows are bytes in the file for two teachers and 1,000 views. Their floor is what logits alone take: 2 bytes
each where all are kept, 4 bytes each (and 2 for what the others share) where 32 of 1,000 are.
"""

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.floor import peak_operations, product_note
from benchmarks.step import (
    BATCH_SIZE,
    CLASSES,
    SIZE,
    SKIP,
    TOKENS,
    preset_teachers,
    random_split,
    step_operations,
    student,
    training,
)
from benchmarks.table import Row, Setting, Table, in_turns, machine
from coadvise.advice import LossWeights
from coadvise.config import CacheConfig, EngineConfig, RecipeConfig, load_config
from coadvise.data.views import Views
from coadvise.distill.logit_cache import Arrays, Form, LogitCache, StoredLogits
from coadvise.distill.teachers import Teachers
from coadvise.runs.build_cache import answers
from coadvise.training.engine import Engine
from coadvise.training.loop import Advisers

STUDENT, GOAL, TOP_K = "cit_micro_aligned_patch4_32", 0.952, CacheConfig().top_k  # 1 / 1.05


def run(setting: Setting) -> Table:
    """Times the three students, and measures files."""
    config = load_config("small-images")
    device = "cuda" if setting.device.type == "cuda" else "cpu"
    engine = Engine(EngineConfig(device=device, precision=setting.precision, compile=setting.compile))
    peak = peak_operations(setting)
    turn = 20 if engine.device.type == "cuda" else 1
    batch_size = setting.batch_size or BATCH_SIZE
    images = (SKIP + setting.repeats + 1) * turn * batch_size
    recipe = RecipeConfig(epochs=1, batch_size=batch_size, warmup_epochs=0, clip=1.0, evaluations=1)
    views = Views(random_split(images), config.augment, len(CLASSES), SIZE, seed=0)
    teachers, form = preset_teachers(config, engine), Form(len(CLASSES), TOP_K)
    with tempfile.TemporaryDirectory() as folder:
        cache = LogitCache(Path(folder, "few"), {"made for": "timing"})
        began = time.perf_counter()
        few = _megabytes(
            cache, answers(views.on(engine.device), 0, teachers, form, engine, 0, lambda batch: None), images
        )
        building = (time.perf_counter() - began) / images
        began = time.perf_counter()
        cache.read(0)
        reading = (time.perf_counter() - began) / images
        many = _megabytes(LogitCache(Path(folder, "many"), {}), _many_classes(1000), 1000)
        advisers: dict[str, Advisers] = {
            "none": Teachers({}),
            "cached": StoredLogits(cache, TOKENS, form),
            "asked": teachers,
        }
        runs = {
            name: training(
                student(STUDENT, name != "none"), recipe, views, adviser,
                LossWeights() if name == "none" else config.loss_weights, engine,
            )
            for name, adviser in advisers.items()
        }  # fmt: skip
        speeds = {
            name: batch_size / seconds for name, seconds in in_turns(runs, turn, SKIP, engine.synchronise).items()
        }
    floor = {
        name: peak / step_operations(student(STUDENT, advised=True), asked)
        for name, asked in (("cached", Teachers({})), ("asked", teachers))
    }
    rows = [
        Row("advised from a cache", "images/s", speeds["cached"], speeds["none"], floor["cached"], GOAL),
        Row("advised by two teachers", "images/s", speeds["asked"], speeds["none"], floor["asked"]),
        Row("1,000 views, 10 classes", "MB", few, floor=2 * 1000 * 2 * 10 / 1e6),
        Row("1,000 views, 1000 classes", "MB", many, floor=2 * 1000 * (2 + 4 * TOP_K) / 1e6),
    ]
    notes = [
        product_note(peak),
        f"making views and storing two teachers' answers: {1e3 * building:.3g} ms an image, once",
        f"reading and checking a shard: {1e6 * reading:.3g} µs an image, once an epoch",
    ]
    about = {**machine(setting), "batch": batch_size, "pixels": SIZE, "layout": "channels-last", "mode": "training"}
    about["student"] = STUDENT
    return Table("training step advised from a logit cache", "no teachers", rows, about, notes)


def _many_classes(classes: int) -> Arrays:
    """Two teachers' random answers for 1,000 views."""
    form = Form(classes, TOP_K)
    return {name: rows for token in TOKENS for name, rows in form.pack(token, torch.randn(1000, classes)).items()}


def _megabytes(cache: LogitCache, arrays: Arrays, views: int) -> float:
    """Stores an epoch. Returns what its shard takes for each 1,000 views."""
    cache.create()
    with cache.claim(0) as file:
        assert file is not None
        cache.write(0, file, arrays)
    return cache.shard(0).stat().st_size / views * 1000 / 1e6
