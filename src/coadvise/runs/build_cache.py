"""Fills a logit cache: says what it will take, then asks the teachers about every view of every epoch once."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from coadvise.config import RunConfig, parse_config, read_config
from coadvise.data.loader import epoch_batches
from coadvise.data.scan import Dataset, scan
from coadvise.data.sources import source_of
from coadvise.data.views import Batch, Views
from coadvise.data.workers import seconds_with_workers
from coadvise.distill.logit_cache import Arrays, Form, LogitCache, fingerprint, form_of, refuse_stand_ins, seed_folder
from coadvise.distill.teachers import Teachers
from coadvise.errors import Interrupted, UserError
from coadvise.runs.parallel import in_processes, of_run
from coadvise.runs.run import CONFIG, Run, cache_of, check_no_run, check_run, with_resolved_source
from coadvise.storage import MANIFEST
from coadvise.training.engine import Engine, resolve_precision
from coadvise.training.listener import Listener, Silent
from coadvise.training.metrics import Recorder

PART = "logit cache"
BATCH = 256  # views the teachers see at a time; even, so that a pair that is mixed is in one batch


def build_cache(
    run: str | Path,
    out: str | Path | None = None,
    seeds: int = 1,
    epochs: int | None = None,
    jobs: int = 1,
    top_k: int | None = None,
    listener: Listener | None = None,
) -> Path:
    """Stores what a run's teachers say of its students' views, for `fit(cache=...)`; trains nothing.

    What is stored already stays; several processes, started in any way, share the work.

    Args:
        run: a run directory whose teachers are trained; it is only read.
        out: the cache; RUN/cache when not given.
        seeds: students' seeds, from the run's on.
        epochs: of views; as many as the run's student sees when not given.
        jobs: processes that share the work here, each with its share of the cores.
        top_k: logits kept of an answer where there are many classes; the run's, or 32, when not given.
        listener: is told what happens.

    Returns:
        The cache's folder: seed-S/cache.json and a file an epoch.

    Raises:
        UserError: no such run, teachers not trained yet, a cache of something else, no room.
        Interrupted: stopped by a signal; the same call goes on.
    """
    folder, listener = Path(run), listener or Silent()
    for name, value in (("seeds", seeds), ("jobs", jobs), ("epochs", 1 if epochs is None else epochs)):
        if value < 1:
            raise UserError(f"{name}={value}; at least one is needed")
    check_run(folder)
    kept = {} if top_k is None else {"top_k": top_k}
    values = with_resolved_source(folder, read_config(folder / CONFIG)).model_dump(mode="json")
    config = parse_config({**values, "cache": {**(values.get("cache") or {}), **kept}})
    config = config.model_copy(update={"engine": resolve_precision(config.engine)})
    for name in config.teachers:
        if not (folder / "teachers" / name / MANIFEST).is_file():
            raise UserError(
                f"teacher '{name}' of '{folder}' is not trained yet; run the same 'coadvise fit' again first"
            )
    source = source_of(config)
    cache = Path(out or folder / "cache")
    with Engine(config.engine) as engine:
        if not engine.is_main:  # one process speaks
            listener = Silent()
        dataset = scan(source, config.data.image_size, config.in_memory, config.data.presize, listener.say)
        record = Recorder(folder, write=False, say=listener.say)
        chosen = range(config.seed, config.seed + seeds)
        check_caches(cache, config, dataset, chosen)
        complete(Run(folder, config, dataset, engine, record, listener, cache), chosen, jobs, epochs)
    return cache


def epochs_of_views(config: RunConfig, epochs: int | None = None) -> int:
    """How many epochs of views there are in so many epochs of training (None: the student's)."""
    epochs = epochs or config.student.recipe.epochs
    return min(epochs, config.augment.recycle or epochs)


def check_caches(folder: Path, config: RunConfig, dataset: Dataset, seeds: Sequence[int]) -> None:
    """Raises UserError for caches of other data or views, or no place for one; teachers need not be trained yet."""
    check_no_run(folder, f"give it as --reuse to take its networks, or '{folder / 'cache'}' as the cache")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; give a folder for the logit cache")
    for seed in seeds:
        same = fingerprint(config, dataset, {}, seed)
        LogitCache(seed_folder(folder, seed), same).check(same.keys() - {"teachers"})


def complete(run: Run, seeds: Sequence[int], jobs: int = 1, epochs: int | None = None) -> None:
    """Stores the epochs that are missing, after saying how much room and time they will take.

    Raises:
        UserError: a cache of something else, a damaged shard, no room for it.
        Interrupted: a signal asked for a stop; every epoch that is done is stored.
    """
    epochs, say = epochs_of_views(run.config, epochs), run.listener.say
    caches, missing = [cache_of(run, seed) for seed in seeds], 0
    for cache in caches:
        cache.check()
        missing += len(cache.missing(epochs))
    whole = f"{PART} {run.cache}: {_epochs(epochs * len(seeds), len(seeds))}"
    if missing == 0:
        say(f"{whole}, all stored; no teacher is asked")
        return
    for cache in caches:
        cache.create()
    assert run.cache is not None
    form, images = form_of(run.config, len(run.dataset.classes)), len(run.dataset.train)
    size = missing * images * len(run.config.teachers) * form.bytes_an_answer
    free = shutil.disk_usage(run.cache).free
    what = f"views of {_epochs(missing, len(seeds))} x {images:,} images, {len(run.config.teachers)} teachers"
    text = f"{PART} {run.cache}: {what}, {form.classes:,} classes, {form}: {_size(size)}"
    if size > free:
        raise UserError(f"{text}, where {_size(free)} are free; make room, or choose another folder")
    if run.engine.is_main:
        seconds = missing * images * _seconds_a_view(run, seeds[0]) / run.engine.processes
        say(f"{text}, about {_duration(seconds)}")
    if jobs > 1:
        task = of_run(run, partial(fill, seeds=tuple(seeds), epochs=epochs))
        in_processes({f"{PART}, process {n}": task for n in range(1, jobs + 1)}, jobs, run.engine, run.listener)
    else:
        fill(run, seeds, epochs)
    say(f"{whole}, all stored")


def fill(run: Run, seeds: Sequence[int], epochs: int) -> None:
    """Stores epochs until none is missing, leaving to other processes those that they are at.

    Raises:
        StorageError: an epoch cannot be written.
        Interrupted: a signal asked for a stop; every epoch that is done is stored.
    """
    form = form_of(run.config, len(run.dataset.classes))
    caches = [(cache_of(run, seed), run.student_views(seed).on(run.engine.device)) for seed in seeds]
    work = _Work(run, run.load_teachers(), form, caches, epochs)
    for cache, _ in caches:
        cache.sweep()
    with run.engine.graceful_shutdown():
        while missing := work.missing():
            if not any(work.store(*one) for one in missing):  # others are at all of them
                work.stop_if_asked()
                time.sleep(0.2)


@dataclass(frozen=True)
class _Work:
    """Epochs to store: `epochs` of each cache, by the teachers' answers for its views."""

    run: Run
    teachers: Teachers
    form: Form
    caches: Sequence[tuple[LogitCache, Views]]
    epochs: int

    def missing(self) -> list[tuple[LogitCache, Views, int]]:
        return [(cache, views, epoch) for cache, views in self.caches for epoch in cache.missing(self.epochs)]

    def store(self, cache: LogitCache, views: Views, epoch: int) -> bool:
        """Stores an epoch, unless another process is at it or has done so."""
        with cache.claim(epoch) as file:
            if file is None:
                return False
            workers = self.run.config.data.workers
            tick = partial(self.tick, len(views), self.stored())
            cache.write(epoch, file, answers(views, epoch, self.teachers, self.form, self.run.engine, workers, tick))
        self.progress(len(views), self.stored(), 0)
        return True

    def stored(self) -> int:
        """Epochs that are stored, by whatever process."""
        return len(self.caches) * self.epochs - len(self.missing())

    def tick(self, images: int, stored: int, batch: int) -> None:
        """Before each batch of an epoch."""
        self.stop_if_asked()
        if batch:
            self.progress(images, stored, batch)

    def progress(self, images: int, stored: int, batches: int) -> None:
        """Tells how far all processes together are; of epochs that are not stored yet only this process's is known."""
        an_epoch, total = math.ceil(images / BATCH), len(self.caches) * self.epochs
        self.run.listener.progress(PART, stored * an_epoch + batches, total * an_epoch, {})

    def stop_if_asked(self) -> None:
        if self.run.engine.stop_requested:
            total = len(self.caches) * self.epochs
            raise Interrupted(f"stopped with {self.stored()} of {total} epochs of logits stored")


def answers(
    views: Views, epoch: int, teachers: Teachers, form: Form, engine: Engine, workers: int, tick: Callable[[int], None]
) -> Arrays:
    """What is stored of an epoch, its rows in the images' order; `tick` gets each batch's number before it is asked."""
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
    """The answers for a batch, asked for as training does, as they are stored."""
    with engine.autocast():
        advice = teachers(engine.place(batch))
    return {name: rows for teacher, logits in advice.items() for name, rows in form.pack(teacher, logits).items()}


def _seconds_a_view(run: Run, seed: int) -> float:
    """Measured on one batch, after one that warms up."""
    views, teachers = run.student_views(seed).on(run.engine.device), run.load_teachers()
    workers = run.config.data.workers if views.device.type == "cpu" else 0
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


def _size(size: float) -> str:
    unit, factor = next((u, f) for u, f in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)) if size < 999.5 * f or u == "GB")
    return f"{size / factor:.1f} {unit}" if size < 99.5 * factor else f"{size / factor:.0f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
