"""The main job: scan the data, train the teachers, train the students, say whether advice helped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from coadvise.data.balance import class_weights, unbalanced
from coadvise.data.pipeline import check_notation
from coadvise.data.quarantine import check_share
from coadvise.data.scan import scan
from coadvise.data.scanned import Dataset, scored_and_trained_on, under_two_labels
from coadvise.data.sources import source_of
from coadvise.errors import UserError
from coadvise.machine import shortcomings
from coadvise.models.module import overrides_for, register
from coadvise.runs.build_cache import check_caches, fill_caches
from coadvise.runs.conclude import conclude
from coadvise.runs.estimate import Forecast, forecast, is_worth_timing
from coadvise.runs.executors.base import of_run, run_tasks
from coadvise.runs.executors.cluster import Cluster, take_over
from coadvise.runs.executors.local import Local, check_jobs
from coadvise.runs.executors.places import cluster_of
from coadvise.runs.experience import expectation
from coadvise.runs.lock import lock_folder
from coadvise.runs.network_job import check_part, is_done, is_trained, train_part
from coadvise.runs.options import LOCAL, FitOptions, help_text
from coadvise.runs.plan import ADVISED, TEACHER, Part, RunPlan, plan_fit
from coadvise.runs.reuse import check_reuse, reuse_networks
from coadvise.runs.run import (
    CONFIG,
    DATA,
    SPLIT_WORDS,
    Run,
    check_folder,
    check_images,
    check_space,
    discard_outdated,
    identity,
    image_change_lines,
    tracked,
)
from coadvise.runs.schedule import phases
from coadvise.training.engine import Engine, resolve_auto
from coadvise.training.listener import Listener, Silent
from coadvise.training.metrics import Recorder
from coadvise.training.trackers import check_trackers


def fit(
    data: str | Path,
    preset: str | None = None,
    out: str | Path | None = None,
    listener: Listener | None = None,
    teachers: Mapping[str, nn.Module] | None = None,
    **options: Any,
) -> Path:
    """Trains teachers and a co-advised student on a folder of labelled images, and compares them.

    A run directory that holds the same run continues where it stopped. A finished one can be given `baseline` and more
    `seeds`.

    Args:
        data, preset, out, options: the options below, the same as those of `coadvise fit`.
        listener: receives progress and messages; silent if not given.
        teachers: modules that advise, by the teacher's name. One answers logits of the data's classes in their order,
            for normalised images; or logits or features of any number, from which it learns these classes with
            `teachers.NAME.adapt=probe` or `finetune` among the overrides. The run keeps its weights, not its code.

    Returns:
        The run directory, with config.yaml, data.json, pictures.tsv, metrics.jsonl, teachers/, students/, predictions/,
        report.html.

    Raises:
        UserError: invalid input. Nothing is written before data and configuration have been checked.
        Interrupted: stopped by a signal; the same call continues.
        StorageError: the run directory cannot be written any more; what was saved is intact.
        LostProcessError: one of several processes died or hangs.
    """
    given = FitOptions.of(data=data, preset=preset, out=out, **options)
    return run_fit(_plan_with(teachers, given) if teachers else plan_fit(given), listener)


fit.__doc__ = (fit.__doc__ or "") + help_text(FitOptions)


def _plan_with(modules: Mapping[str, nn.Module], options: FitOptions) -> RunPlan:
    """A plan whose teachers are modules of this process."""
    if options.given_jobs not in (None, 1):
        raise UserError(
            f"jobs={options.jobs}: teachers given as modules are only known to this process; leave out jobs"
        )
    if options.on != LOCAL:
        raise UserError(f"on={options.on}: teachers given as modules are only known to this process; leave out on")
    changes = overrides_for(modules, options.overrides)
    plan = replace(plan_fit(replace(options, overrides=(*options.overrides, *changes))), jobs=1)
    source, config = plan.source or source_of(plan.config), plan.config
    for name, module in modules.items():
        adapted = config.teachers[name].adaptation != "none"
        register(name, module, config.data.image_size, source.classes, adapted)
    return plan


def run_fit(plan: RunPlan, listener: Listener | None = None) -> Path:
    """Does what `fit` promises, from a plan."""
    plan = _resolved(plan)
    with Engine(plan.config.engine) as engine, training(plan, engine, listener or Silent()) as run:
        conclude(run, plan.parts)
    return plan.folder


def estimate_fit(plan: RunPlan, say: Callable[[str], None], tell: Callable[[str, float], None]) -> Forecast:
    """How long a run will take here, wherever it is to be trained. Writes nothing, and refuses what `fit` refuses.

    Not counted: evaluation, compilation, filling a cache. Views are timed from image files, even if the run would keep
    presized images.

    Args:
        say: receives the description of the data, before anything is timed.
        tell: receives each network, and the seconds its training will take, as soon as they are known; 0 if it is done.
    """
    plan = replace(_resolved(plan), on=LOCAL)
    config = plan.config
    source, data = plan.source or source_of(config), config.data
    check_folder(plan.folder, config, plan.allow_changes)
    dataset = scan(source, data.image_size, config.in_memory, fit=data.fit)
    for line in _introduction(plan, dataset):
        say(line)
    outdated = "train" in check_images(plan.folder, dataset, plan.allow_changes)
    with Engine(config.engine) as engine:
        _check(plan, dataset, engine, outdated)
        return forecast(plan, dataset, engine, tell)


def _resolved(plan: RunPlan) -> RunPlan:
    """The plan with what `auto` means on this machine: a run keeps what it began with."""
    return replace(plan, config=resolve_auto(plan.config))


@contextmanager
def training(plan: RunPlan, engine: Engine, listener: Listener) -> Iterator[Run]:
    """Trains the networks of a plan that are missing, teachers first, and keeps the run directory locked meanwhile.

    Args:
        plan: its configuration names a precision.
        engine: entered.

    Raises:
        UserError, Interrupted, StorageError, LostProcessError: as `fit`.
    """
    folder, config = plan.folder, plan.config
    changed = check_folder(folder, config, plan.allow_changes)
    if not engine.is_main:  # only one process talks
        listener = Silent()
    source, data = plan.source or source_of(config), config.data
    dataset = scan(source, data.image_size, config.in_memory, data.presize, listener.say, data.fit)
    for line in _introduction(plan, dataset) if plan.introduce else ():
        listener.say(line)
    image_changes = check_images(folder, dataset, plan.allow_changes)
    changed += image_change_lines(image_changes)
    _check(plan, dataset, engine, outdated="train" in image_changes)
    new = not (folder / CONFIG).exists()
    if new and plan.preset and plan.on == LOCAL and engine.processes == 1:
        for line in _foreseen(plan, dataset, engine):
            listener.say(line)

    with (
        cluster_of(plan.on, folder, config, engine, plan.jobs) as cluster,
        engine.graceful_shutdown(),
        engine.detect_lost_ranks(),
        lock_folder(folder, engine),
    ):
        if not engine.equal_on_all_ranks(str(identity(dataset))):
            raise UserError(
                f"the processes do not read the same images in '{dataset.source.where}'; this one {len(dataset.train)} "
                f"for training and {len(dataset.val)} for validation; check the disk of each host"
            )
        record = Recorder(folder, engine.is_main, listener.say)
        if cluster:
            cluster.begin(record.take_missing)
        elif engine.is_main:
            take_over(folder, record.take_missing)
        run = Run(folder, config, dataset, engine, record, listener, plan.cache)
        discard_outdated(run, image_changes)
        run.describe(sorted({part.seed for part in plan.parts}), changed)
        for line in [f"run directory: {folder}", *shortcomings()] if plan.introduce else ():
            listener.say(line)
        for line in changed:
            listener.say(f"changed: {line}")
        with tracked(run):
            _train_all(run, plan, cluster)
            yield run


def _foreseen(plan: RunPlan, dataset: Dataset, engine: Engine) -> Iterator[str]:
    """Which preset was chosen, and how long it will take; nothing where that is short."""
    if plan.by_default:
        yield f"preset {plan.preset}, chosen for these images and this machine"
    if is_worth_timing(plan, dataset):
        found = forecast(plan, dataset, engine)
        yield f"training will take about {found.text()}; --dry-run says how long each network takes"
        if warning := found.warning(plan.preset):
            yield warning


def _check(plan: RunPlan, dataset: Dataset, engine: Engine, outdated: bool) -> None:
    """Raises UserError, before anything is written, for what would fail later.

    Args:
        outdated: the training images changed, so that finished networks and stored logits are made again.
    """
    folder, config = plan.folder, plan.config
    for name, split in dataset.splits.items():
        what = SPLIT_WORDS[name]
        if lost := split.unreadable:
            check_share(what, len(lost), len(split) + len(lost), config.data.max_unreadable, lost[0])
    check_jobs(plan.jobs or 1, engine)
    for augment in (config.augment, *(teacher.augment for teacher in config.teachers.values())):
        if augment and augment.kind == "deit":
            check_notation(augment)
    class_weights(config.data, dataset.classes, dataset.train.per_class(len(dataset.classes)))
    sizes = [check_part(part, folder, config, dataset, engine, outdated) for part in plan.parts]
    check_space(folder, sizes, max(phase.jobs for phase in phases(plan, engine)))
    check_trackers(config.engine.trackers)
    if plan.reuse is not None:
        check_reuse(plan.reuse, dataset, config.data.image_size)
    if plan.cache is not None:
        seeds = [p.seed for p in plan.parts if p.role == ADVISED and (outdated or not is_done(folder, p))]
        check_caches(plan.cache, config, dataset, seeds, outdated)


def _train_all(run: Run, plan: RunPlan, cluster: Cluster | None) -> None:
    """Trains what is missing. A cache is filled here: processes that share it need locks of files."""
    for parts, jobs in phases(plan, run.engine):
        if plan.reuse is not None:
            reuse_networks(run, parts, plan.reuse)
        advised = [part.seed for part in parts if part.role == ADVISED and not is_trained(run.folder, part)]
        if plan.cache is not None and advised:
            fill_caches(run, advised, 1 if cluster else jobs)
        _train(run, parts, jobs, cluster)


def _train(run: Run, parts: Sequence[Part], jobs: int, cluster: Cluster | None) -> None:
    """Trains networks, advised students after all teachers."""
    if (jobs == 1 and not cluster) or all(is_done(run.folder, part) for part in parts):
        for part in parts:
            train_part(run, part)
        return
    executor = cluster or Local(jobs, run.engine)
    if cluster:  # what is done is not worth a place in a queue
        done = [part for part in parts if is_done(run.folder, part)]
        for part in done:
            train_part(run, part)
        parts = [part for part in parts if part not in done]
    tasks = {part.name: of_run(run, partial(train_part, part=part), executor) for part in parts}
    teachers = [part.name for part in parts if part.role == TEACHER]
    after = {part.name: teachers for part in parts if part.role == ADVISED}
    follow = run.record.follow if executor.tasks_write else run.record.take
    run_tasks(tasks, executor, run.engine, run.listener, after, follow)


def _introduction(plan: RunPlan, dataset: Dataset) -> Iterator[str]:
    """The data, and what advice on such data has gained."""
    yield from describe(dataset)
    known = expectation(dataset.train.per_class(len(dataset.classes)))
    if known and any(part.role == ADVISED for part in plan.parts):
        yield known


def describe(dataset: Dataset) -> Iterator[str]:
    """The data in a few lines: classes, counts, sizes, the split, what cannot be read."""
    names = ", ".join(dataset.classes[:12]) + (", ..." if len(dataset.classes) > 12 else "")
    yield f"data: {dataset.source.where}, {len(dataset.classes)} classes ({names})"
    yield f"split: {dataset.source.note}"
    yield from (f"  {line}" for line in dataset.source.remarks)
    for name, split in dataset.splits.items():
        counts = split.per_class(len(dataset.classes))
        widths, heights = zip(*split.sizes, strict=True)
        size = f"{min(widths)}x{min(heights)}" + (f" to {max(widths)}x{max(heights)}" if len(split.sizes) > 1 else "")
        what = name if name == "train" else SPLIT_WORDS[name]
        yield f"{what}: {len(split)} images, {min(counts)} to {max(counts)} a class, {size} pixels"
        if name == "train" and split.values is not None:
            low, high = split.values
            yield f"  images of more than 8 bits hold values from {low:g} to {high:g}, which become black and white"
    yield from _faults(dataset)


def _faults(dataset: Dataset) -> Iterator[str]:
    """The cheap part of `coadvise check`, in at most two lines: about the files, and about the classes."""
    files, scored_are = [], SPLIT_WORDS[dataset.scored_name]
    if lost := [fault for split in dataset.splits.values() for fault in split.unreadable]:
        more = f" and {len(lost) - 3} more in {DATA}" if len(lost) > 3 else ""
        files.append(
            f"{len(lost)} file(s) cannot be read and are left out ({', '.join(lost[:3])}{more})"
            + (f", so scores are over {len(dataset.scored)} {scored_are} images" if dataset.scored.unreadable else "")
        )
    if both := scored_and_trained_on(dataset):
        scored, trained = both[0]
        files.append(
            f"{len(both)} of the {len(dataset.scored)} {scored_are} images are also training images, byte for byte "
            f"(for example {scored!r} and {trained!r}), so scores on them say little"
        )
    if doubtful := under_two_labels(dataset):
        one, other = doubtful[0]
        files.append(f"{len(doubtful)} image(s) have two labels (for example {one!r} and {other!r})")
    if files:
        yield f"files: {'; '.join(files)}; 'coadvise check' shows them and writes a table without them"
    counts = dataset.train.per_class(len(dataset.classes))
    if unbalanced(counts):
        largest, smallest = (dataset.classes[counts.index(extreme(counts))] for extreme in (max, min))
        yield (
            f"classes are of unequal size: '{largest}' has {max(counts)} training images, '{smallest}' {min(counts)}; "
            "data.balance=loss makes each count the same"
        )
