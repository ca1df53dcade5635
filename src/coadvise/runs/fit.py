"""The main job: scan the data, train teachers, co-advise the student, train it alone, say whether advice helped."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from coadvise.config import CacheConfig, RunConfig, load_config
from coadvise.data.quarantine import check_share
from coadvise.data.scan import Dataset, scan, scored_and_trained_on
from coadvise.data.sources import NAMED, source_of, typical_size
from coadvise.errors import UserError
from coadvise.runs.build_cache import check_caches, complete
from coadvise.runs.conclude import conclude
from coadvise.runs.foresight import foresee
from coadvise.runs.network_job import check_part, is_done, is_trained, train_part
from coadvise.runs.parallel import check_jobs, in_processes, of_run
from coadvise.runs.plan import ADVISED, TEACHER, Part, plan
from coadvise.runs.reuse import check_reuse, take
from coadvise.runs.run import DATA, Run, check_folder, check_space, data_record, open_record, owned
from coadvise.training.engine import Engine, resolve_precision
from coadvise.training.listener import Listener, Silent
from coadvise.training.trackers import tracker


def fit(
    data: str | Path,
    preset: str | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    baseline: bool = False,
    seeds: int = 1,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    listener: Listener | None = None,
    cache: str | Path | None = None,
    allow_changes: bool = False,
    reuse: str | Path | None = None,
) -> Path:
    """Trains teachers and a co-advised student on a folder of labelled images, and says what came of it.

    A run directory that holds the same run goes on where it stopped; a finished one may be given `baseline` and more
    `seeds`.

    Args:
        data: a folder with train/ and val/, valid/ or test/; a folder of class folders; or "digits".
        preset: a name of `coadvise presets` or a YAML file; chosen by the images' size when not given.
        out: the run directory; runs/DATA-PRESET-seedN when not given.
        seed: overrides the preset's.
        baseline: also train the same student on the same views with no teacher, and compare.
        seeds: students to train, at seed, seed + 1, ...; they share the teachers.
        jobs: networks to train at the same time, each in a process of its own with its share of the cores.
        overrides: configuration changes, "a.b=c".
        listener: is told what happens.
        cache: a folder of teachers' logits for the students' views: what is missing is stored first, then students are
            advised by what is stored there, rounded to float16, and no teacher is asked in their steps.
        allow_changes: go on with a run of another configuration; what it has finished already stays as it is.
        reuse: a run directory on the same images, whose networks are taken where all that decides their numbers is the
            same here, in place of training them again.

    Returns:
        The run directory: config.yaml, data.json, metrics.jsonl, teachers/, students/, predictions/, report.html.

    Raises:
        UserError: anything the user can mend. Nothing is written before data and configuration have been checked.
        Interrupted: stopped by a signal; the same call goes on.
        StorageError: the run directory cannot be written any longer; what was saved is whole.
        LostProcessError: of several processes another one died or hangs.
    """
    check_jobs(jobs)
    listener = listener or Silent()
    chosen = preset or default_preset(data)
    config, folder, parts = _planned(data, chosen, out, seed, baseline, seeds, overrides, cache)
    with Engine(config.engine) as engine:
        if preset is None and chosen == "photos" and engine.device.type == "cpu" and engine.is_main:
            listener.say(
                "no GPU here, and photos, the preset for images of this size, is made for one: --dry-run says how "
                "long it takes, --preset small-images looks at them at 32 pixels and is made for CPUs"
            )
        with training(config, folder, parts, engine, jobs, listener, cache, allow_changes, reuse) as run:
            conclude(run, parts)
    return folder


def foresee_fit(
    data: str | Path,
    preset: str | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    baseline: bool = False,
    seeds: int = 1,
    overrides: Sequence[str] = (),
    cache: str | Path | None = None,
) -> Iterator[tuple[str, float]]:
    """What `fit` would train: (the network in words, the seconds it will take here); 0 where it is done.

    Nothing is written. Evaluation, compiling and filling a cache are not counted. Views are timed as made from
    files, also where a run keeps presized images.
    """
    config, folder, parts = _planned(data, preset, out, seed, baseline, seeds, overrides, cache)
    dataset = scan(source_of(config), config.data.image_size, config.in_memory)
    with Engine(config.engine) as engine:
        for part, seconds in foresee(parts, folder, config, dataset, engine):
            yield part.title, seconds


def _planned(
    data: str | Path, preset: str | None, out: str | Path | None, seed: int | None, baseline: bool, seeds: int,
    overrides: Sequence[str], cache: str | Path | None,
) -> tuple[RunConfig, Path, list[Part]]:  # fmt: skip
    """A run's configuration, directory and networks."""
    if seeds < 1:
        raise UserError(f"seeds={seeds}; at least one student is needed")
    preset = preset or default_preset(data)
    config = _with_cache(load_config(preset, overrides, seed, str(data)), cache)
    config = config.model_copy(
        update={"engine": resolve_precision(config.engine)}
    )  # a run keeps the precision it began with
    folder = Path(out or f"runs/{Path(data).resolve().name}-{Path(preset).stem}-seed{config.seed}")
    return config, folder, plan(config, seeds, baseline)


@contextmanager
def training(
    config: RunConfig,
    folder: Path,
    parts: Sequence[Part],
    engine: Engine,
    jobs: int,
    listener: Listener,
    cache: str | Path | None = None,
    allow_changes: bool = False,
    reuse: str | Path | None = None,
    introduce: bool = True,
) -> Iterator[Run]:
    """Trains the networks of a run that are not trained yet, teachers first, and holds the run directory meanwhile.

    Args:
        config: as `load_config` gives it, its precision resolved.
        folder: the run directory.
        parts: the networks wanted, as `plan` gives them.
        engine: entered.
        jobs, listener, cache, allow_changes, reuse: as `fit` takes them.
        introduce: say what the data are, and which run directory it is.

    Raises:
        UserError, Interrupted, StorageError, LostProcessError: as `fit`.
    """
    changed = check_folder(folder, config, allow_changes)
    source = source_of(config)
    if not engine.is_main:  # one process speaks
        listener = Silent()
    dataset = scan(source, config.data.image_size, config.in_memory, config.data.presize, listener.say)
    for line in describe(dataset) if introduce else ():
        listener.say(line)
    for what, split in (("training", dataset.train), ("validation", dataset.val)):
        if lost := split.unreadable:
            check_share(what, len(lost), len(split) + len(lost), config.data.max_unreadable, lost[0])
    # a network that cannot be made, had, trained or saved is an error before anything is written
    check_space(folder, [check_part(part, folder, config, dataset, engine) for part in parts], jobs)
    for name in config.engine.trackers:
        tracker(name)
    if reuse is not None:
        check_reuse(Path(reuse), dataset, config.data.image_size)
    if cache is not None:  # before hours of training teachers
        advised = [part.seed for part in parts if part.role == ADVISED and not is_done(folder, part)]
        check_caches(Path(cache), config, dataset, advised)

    with engine.graceful_shutdown(), engine.detect_lost_ranks(), owned(folder, engine):
        if not engine.equal_on_all_ranks(json.dumps(data_record(dataset, config.data.image_size)["splits"])):
            raise UserError(
                f"the processes do not read the same images in '{source.where}'; this one {len(dataset.train)} to "
                f"train on and {len(dataset.val)} to score: look after its disk"
            )
        record = open_record(folder, config, engine, listener.say)
        run = Run(folder, config, dataset, engine, record, listener, Path(cache) if cache is not None else None)
        run.describe(sorted({part.seed for part in parts}), changed)
        if introduce:
            listener.say(f"run directory: {folder}")
        for line in changed:
            listener.say(f"changed: {line}")
        teachers, students = [a for a in parts if a.role == TEACHER], [a for a in parts if a.role != TEACHER]
        between = reuse is not None or cache is not None  # something is done once all teachers are there
        if reuse is not None:
            take(run, teachers, Path(reuse))
        if between:
            _train(run, teachers, jobs)
        if reuse is not None:
            take(run, students, Path(reuse))
        advised = [part.seed for part in students if part.role == ADVISED and not is_trained(folder, part)]
        if cache is not None and advised:
            complete(run, advised, jobs)
        _train(run, students if between else [*teachers, *students], jobs)
        yield run


def _train(run: Run, parts: Sequence[Part], jobs: int) -> None:
    """Trains networks, advised students after all teachers."""
    if jobs > 1:
        tasks = {part.name: of_run(run, partial(train_part, part=part)) for part in parts}
        teachers = [part.name for part in parts if part.role == TEACHER]
        after = {part.name: teachers for part in parts if part.role == ADVISED}
        in_processes(tasks, jobs, run.engine, run.listener, after)
    else:
        for part in parts:
            train_part(run, part)


def _with_cache(config: RunConfig, cache: str | Path | None) -> RunConfig:
    """Stored logits are rounded, so that students are advised by them belongs to what decides the numbers."""
    if cache is None and config.cache is not None:
        raise UserError("in this configuration students are advised by stored logits (cache); give --cache DIR")
    return config if cache is None else config.model_copy(update={"cache": config.cache or CacheConfig()})


def default_preset(data: str | Path) -> str:
    """That of a named source; else `small-images` up to 96 pixels, `photos` above."""
    if (named := NAMED.get(str(data))) is not None:
        return named.preset
    return "small-images" if typical_size(data) <= 96 else "photos"


def describe(dataset: Dataset) -> Iterator[str]:
    """The data in a few lines: classes, counts, sizes, the split, what cannot be read."""
    names = ", ".join(dataset.classes[:12]) + (", ..." if len(dataset.classes) > 12 else "")
    yield f"data: {dataset.source.where}, {len(dataset.classes)} classes ({names})"
    yield f"split: {dataset.source.note}"
    yield from (f"  {line}" for line in dataset.source.remarks)
    for name, split in (("train", dataset.train), ("validation", dataset.val)):
        counts = split.per_class(len(dataset.classes))
        widths, heights = zip(*split.sizes, strict=True)
        size = f"{min(widths)}x{min(heights)}" + (f" to {max(widths)}x{max(heights)}" if len(split.sizes) > 1 else "")
        yield f"{name}: {len(split)} images, {min(counts)} to {max(counts)} a class, {size} pixels"
        for fault in split.unreadable[:5]:
            yield f"  left out, cannot be read: {fault}"
        if len(split.unreadable) > 5:
            yield f"  and {len(split.unreadable) - 5} more; all are listed in {DATA}"
    if both := scored_and_trained_on(dataset):
        scored, trained = both[0]
        yield (
            f"{len(both)} of the {len(dataset.val)} validation images are training images too, to the byte ({scored!r} "
            f"is {trained!r}); of these the scores say little: leave them in one of both"
        )
    if dataset.val.unreadable:
        yield f"scores are over the {len(dataset.val)} validation images that can be read"
