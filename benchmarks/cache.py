"""A training step advised from a logit cache against the same student's step without teachers.

The loop of `fit` trains cit_micro_aligned_patch4_32 (preset small-images) three times: without teachers, advised by
teachers' logits from a cache, and advised by the teachers themselves. They take turns, one step (on CUDA 20 steps)
each; figures are medians. A cache is read one shard per epoch; the notes say how long that takes. The floor is a step's
arithmetic, as in `step`.

The last rows are bytes in the cache for two teachers and 1,000 views. Their floor is the logits alone: 2 bytes each if
all are stored; 4 bytes each, and 2 bytes for the rest together, if 32 of 1,000 are stored.
"""

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.floor import peak_operations, product_note
from benchmarks.step import (
    ALIGNED,
    CLASSES,
    CONFIG,
    SIZE,
    SKIP,
    TOKENS,
    preset_teachers,
    random_split,
    step_operations,
    steps_of,
    student,
    training,
)
from benchmarks.table import Row, Setting, Table, in_turns, machine
from coadvise.config.schema import CacheConfig
from coadvise.data.views import Views
from coadvise.distill.logit_cache import Arrays, Form, LogitCache, StoredLogits
from coadvise.runs.build_cache import answers

GOAL, TOP_K = 0.952, CacheConfig().top_k  # 1 / 1.05


def run(setting: Setting) -> Table:
    turn, count, batch_size = steps_of(setting)
    images, form = count * batch_size, Form(len(CLASSES), TOP_K)
    views = Views(random_split(images), CONFIG.augment, len(CLASSES), SIZE, seed=0)
    peak = peak_operations(setting)
    with setting.engine() as engine, tempfile.TemporaryDirectory() as folder:
        teachers = preset_teachers(engine)
        cache = LogitCache(Path(folder, "few"), {"made for": "timing"})
        began = time.perf_counter()
        stored = answers(views.on(engine.device), 0, teachers, form, engine, 0, lambda batch: None)
        few = _megabytes(cache, stored, images)
        built = time.perf_counter()
        cache.read(0)
        read = time.perf_counter()
        many = _megabytes(LogitCache(Path(folder, "many"), {}), _many_classes(1000), 1000)
        advisers = {"none": None, "cached": StoredLogits(cache, TOKENS, form), "asked": teachers}
        runs = {
            name: training(student(ALIGNED, advised=name != "none"), adviser, setting, engine)
            for name, adviser in advisers.items()
        }
        speed = {name: batch_size / s for name, s in in_turns(runs, turn, SKIP, setting.synchronise).items()}
        network = student(ALIGNED, advised=True)
        floor = {"cached": peak / step_operations(network, None), "asked": peak / step_operations(network, teachers)}
    rows = [
        Row("advised from a cache", "images/s", speed["cached"], speed["none"], floor["cached"], GOAL),
        Row("advised by two teachers", "images/s", speed["asked"], speed["none"], floor["asked"]),
        Row("1,000 views, 10 classes", "MB", few, floor=2 * 1000 * 2 * 10 / 1e6),
        Row("1,000 views, 1000 classes", "MB", many, floor=2 * 1000 * (2 + 4 * TOP_K) / 1e6),
    ]
    notes = [
        product_note(peak),
        f"making views and storing two teachers' logits: {1e3 * (built - began) / images:.3g} ms per image, once",
        f"reading and checking a shard: {1e6 * (read - built) / images:.3g} µs per image, once per epoch",
    ]
    about = {**machine(setting), "batch": batch_size, "pixels": SIZE, "layout": "channels-last", "mode": "training"}
    return Table("training step advised from a logit cache", "no teachers", rows, {**about, "student": ALIGNED}, notes)


def _many_classes(classes: int) -> Arrays:
    """Two teachers' random logits for 1,000 views."""
    form = Form(classes, TOP_K)
    return {name: rows for token in TOKENS for name, rows in form.pack(token, torch.randn(1000, classes)).items()}


def _megabytes(cache: LogitCache, arrays: Arrays, views: int) -> float:
    """Stores an epoch. Returns the size of its shard per 1,000 views."""
    cache.create()
    with cache.claim(0) as file:
        assert file is not None
        cache.write(0, file, arrays)
    return cache.shard(0).stat().st_size / views * 1000 / 1e6
