"""Fills a logit cache: runs the teachers once on every view of every epoch and stores their logits."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from coadvise.config.reading import parse_config, read_config
from coadvise.config.schema import RunConfig
from coadvise.data.loader import epoch_batches
from coadvise.data.scan import scan
from coadvise.data.scanned import Dataset
from coadvise.data.sources import source_of
from coadvise.data.views import Batch, Views
from coadvise.data.workers import seconds_with_workers
from coadvise.distill.logit_cache import Arrays, Form, LogitCache, fingerprint, form_of, refuse_stand_ins, seed_folder
from coadvise.distill.teachers import Teachers
from coadvise.errors import Interrupted, UserError
from coadvise.runs.executors.base import of_run, run_tasks
from coadvise.runs.executors.local import Local, check_jobs
from coadvise.runs.run import CONFIG, Run, check_images, check_no_run, check_run, with_resolved_source
from coadvise.storage import MANIFEST, bytes_text
from coadvise.training.engine import Engine, resolve_auto
from coadvise.training.listener import Listener, Silent
from coadvise.training.metrics import Recorder

PART = "logit cache"
BATCH = 256  # views per forward pass; even, so that both images of a mixed pair are in one batch


def build_cache(
    run: str | Path,
    out: str | Path | None = None,
    seeds: int = 1,
    epochs: int | None = None,
    jobs: int = 1,
    top_k: int | None = None,
    listener: Listener | None = None,
) -> Path:
    """Stores the logits of a run's teachers on its students' views, for `fit(cache=...)`. Trains nothing.

    What is stored already stays. Several processes, started in any way, share the work.

    Args:
        run: a run directory with trained teachers; it is only read.
        out: the cache folder; RUN/cache if not given.
        seeds: number of student seeds, counted from the run's seed.
        epochs: epochs of views; those of the run's student if not given.
        jobs: processes that share the work here, each with its share of the cores.
        top_k: largest logits kept of each answer if there are many classes; the run's, or 32, if not given.
        listener: receives progress and messages.

    Returns:
        The cache folder, with seed-S/cache.json and one file an epoch.

    Raises:
        UserError: no such run, teachers not trained yet, a cache of something else, no disk space.
        Interrupted: stopped by a signal; the same call continues.
    """
    folder, listener = Path(run), listener or Silent()
    for name, value in (("seeds", seeds), ("jobs", jobs), ("epochs", 1 if epochs is None else epochs)):
        if value < 1:
            raise UserError(f"{name}={value}; give 1 or more")
    check_run(folder)
    kept = {} if top_k is None else {"top_k": top_k}
    values = with_resolved_source(folder, read_config(folder / CONFIG)).model_dump(mode="json")
    config = parse_config({**values, "cache": {**(values.get("cache") or {}), **kept}})
    config = resolve_auto(config)
    for name in config.teachers:
        if not (folder / "teachers" / name / MANIFEST).is_file():
            raise UserError(f"teacher '{name}' of '{folder}' is not trained yet; finish the run with 'coadvise fit'")
    source = source_of(config)
    cache = Path(out or folder / "cache")
    with Engine(config.engine) as engine:
        check_jobs(jobs, engine)
        if not engine.is_main:  # only one process talks
            listener = Silent()
        dataset = scan(
            source, config.data.image_size, config.in_memory, config.data.presize, listener.say, config.data.fit
        )
        check_images(folder, dataset)
        record = Recorder(folder, write=False, say=listener.say)
        chosen = range(config.seed, config.seed + seeds)
        check_caches(cache, config, dataset, chosen)
        fill_caches(Run(folder, config, dataset, engine, record, listener, cache), chosen, jobs, epochs)
    return cache


def epochs_of_views(config: RunConfig, epochs: int | None = None) -> int:
    """How many epochs of different views there are in `epochs` epochs of training (None: the student's)."""
    epochs = epochs or config.student.recipe.epochs
    return min(epochs, config.augment.recycle or epochs)


def check_caches(
    folder: Path, config: RunConfig, dataset: Dataset, seeds: Sequence[int], images_changed: bool = False
) -> None:
    """Raises UserError for caches of other data or views, or a wrong folder. Teachers need not be trained yet.

    Args:
        images_changed: the caches will be emptied, so they may be of the images before the change.
    """
    check_no_run(folder, f"give it as --reuse to copy its networks, or '{folder / 'cache'}' as the cache")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; give a folder for the logit cache")
    if config.student.standardise and not (form := form_of(config, len(dataset.classes))).dense:
        raise UserError(
            f"student.standardise needs the mean and deviation of all {form.classes} logits, and "
            f"cache.top_k={form.top_k} keeps the largest; give cache.top_k={form.classes}, or leave out --cache"
        )
    for seed in seeds:
        same = fingerprint(config, dataset, {}, seed)
        ignored = {"teachers", "data", "views"} if images_changed else {"teachers"}
        LogitCache(seed_folder(folder, seed), same).check(same.keys() - ignored)


def fill_caches(run: Run, seeds: Sequence[int], jobs: int = 1, epochs: int | None = None) -> None:
    """Stores the epochs that are missing, after saying how much space and time they will take.

    Raises:
        UserError: a cache of something else, a damaged shard, no disk space.
        Interrupted: a signal asked for a stop; every finished epoch is stored.
    """
    epochs, say = epochs_of_views(run.config, epochs), run.listener.say
    caches, missing = [run.logit_cache(seed) for seed in seeds], 0
    for cache in caches:
        cache.check()
        missing += len(cache.missing(epochs))
    whole = f"{PART} {run.cache}: {_epochs(epochs * len(seeds), len(seeds))}"
    if missing == 0:
        say(f"{whole}, all stored; no teacher runs")
        return
    for cache in caches:
        cache.create()
    _announce(run, missing, seeds)
    if jobs > 1:
        processes = Local(jobs, run.engine)
        task = of_run(run, partial(fill, seeds=tuple(seeds), epochs=epochs), processes)
        run_tasks({f"{PART}, process {n}": task for n in range(1, jobs + 1)}, processes, run.engine, run.listener)
    else:
        fill(run, seeds, epochs)
    say(f"{whole}, all stored")


def _announce(run: Run, missing: int, seeds: Sequence[int]) -> None:
    """Says what the missing epochs will take. Raises UserError if the disk is too small."""
    assert run.cache is not None
    form, images = form_of(run.config, len(run.dataset.classes)), len(run.dataset.train)
    size = missing * images * len(run.config.teachers) * form.bytes_an_answer
    free = shutil.disk_usage(run.cache).free
    what = f"views of {_epochs(missing, len(seeds))} x {images:,} images, {len(run.config.teachers)} teachers"
    text = f"{PART} {run.cache}: {what}, {form.classes:,} classes, {form}: {bytes_text(size)}"
    if size > free:
        raise UserError(f"{text}, but only {bytes_text(free)} are free; free some space, or choose another folder")
    if run.engine.is_main:
        seconds = missing * images * _seconds_a_view(run, seeds[0]) / run.engine.processes
        run.listener.say(f"{text}, about {_duration(seconds)}")


def fill(run: Run, seeds: Sequence[int], epochs: int) -> None:
    """Stores epochs until none is missing. Epochs that another process is working on are left to it.

    Raises:
        StorageError: an epoch cannot be written.
        Interrupted: a signal asked for a stop; every finished epoch is stored.
    """
    form = form_of(run.config, len(run.dataset.classes))
    caches = [(run.logit_cache(seed), run.student_views(seed).on(run.engine.device)) for seed in seeds]
    work = _Work(run, run.load_teachers(), form, caches, epochs)
    for cache, _ in caches:
        cache.sweep()
    with run.engine.graceful_shutdown():
        while missing := work.missing():
            if not any(work.store(*one) for one in missing):  # others are working on all of them
                work.stop_if_requested()
                time.sleep(0.2)


@dataclass(frozen=True)
class _Work:
    """What one process needs to store `epochs` epochs of each cache."""

    run: Run
    teachers: Teachers
    form: Form
    caches: Sequence[tuple[LogitCache, Views]]
    epochs: int

    def missing(self) -> list[tuple[LogitCache, Views, int]]:
        return [(cache, views, epoch) for cache, views in self.caches for epoch in cache.missing(self.epochs)]

    def store(self, cache: LogitCache, views: Views, epoch: int) -> bool:
        """Stores an epoch, unless another process does or did so. Returns whether it did."""
        with cache.claim(epoch) as file:
            if file is None:
                return False
            workers = self.run.config.data.workers
            tick = partial(self.tick, len(views), self.stored())
            cache.write(epoch, file, answers(views, epoch, self.teachers, self.form, self.run.engine, workers, tick))
        self.progress(len(views), self.stored(), 0)
        return True

    def stored(self) -> int:
        """Number of epochs that are stored, by all processes together."""
        return len(self.caches) * self.epochs - len(self.missing())

    def tick(self, images: int, stored: int, batch: int) -> None:
        """Called before each batch of an epoch."""
        self.stop_if_requested()
        if batch:
            self.progress(images, stored, batch)

    def progress(self, images: int, stored: int, batches: int) -> None:
        """Reports the progress of all processes: stored epochs, and the batches of this process's current one."""
        an_epoch, total = math.ceil(images / BATCH), len(self.caches) * self.epochs
        self.run.listener.progress(PART, stored * an_epoch + batches, total * an_epoch, {})

    def stop_if_requested(self) -> None:
        if self.run.engine.stop_requested:
            total = len(self.caches) * self.epochs
            raise Interrupted(f"stopped with {self.stored()} of {total} epochs of logits stored")


def answers(
    views: Views, epoch: int, teachers: Teachers, form: Form, engine: Engine, workers: int, tick: Callable[[int], None]
) -> Arrays:
    """The arrays stored of an epoch, their rows in the order of the images. `tick` gets each batch's number first."""
    arrays: Arrays = {}
    for number, batch in enumerate(epoch_batches(views, epoch, BATCH, workers, engine.pins)):
        tick(number)
        refuse_stand_ins(batch)
        for name, rows in _packed(batch, teachers, form, engine).items():
            if name not in arrays:
                arrays[name] = np.empty((len(views), *rows.shape[1:]), rows.dtype)
            arrays[name][batch.index.numpy()] = rows
    return arrays


def _packed(batch: Batch, teachers: Teachers, form: Form, engine: Engine) -> Arrays:
    """The teachers' logits for a batch, computed as in training, in the form in which they are stored."""
    with engine.autocast():
        advice = teachers(engine.place(batch))
    return {name: rows for teacher, logits in advice.items() for name, rows in form.pack(teacher, logits).items()}


def _seconds_a_view(run: Run, seed: int) -> float:
    """Seconds a view takes, measured on the second of two batches."""
    views, teachers = run.student_views(seed).on(run.engine.device), run.load_teachers()
    workers = run.config.data.workers if views.uses_workers else 0
    form = form_of(run.config, len(run.dataset.classes))
    positions = np.arange(min(BATCH, len(views)))
    making = asking = 0.0
    for _ in range(2):
        start = time.perf_counter()
        batch = views[0, positions]
        made = time.perf_counter()
        _packed(batch, teachers, form, run.engine)
        making, asking = made - start, time.perf_counter() - made
    return seconds_with_workers(making, asking, workers, run.engine.device.type) / len(positions)


def _epochs(epochs: int, seeds: int) -> str:
    return f"{epochs:,} epoch{'s' * (epochs > 1)}" + (f" ({seeds} seeds)" if seeds > 1 else "")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
