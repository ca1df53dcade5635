"""The main job: audit the data, train teachers, co-advise the student, train it alone, say whether advice helped."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from coadvise.arm import check_arm, train_arm
from coadvise.conclude import conclude
from coadvise.config import load_config
from coadvise.data.audit import Dataset, audit
from coadvise.data.sources import DIGITS, open_source, typical_size
from coadvise.engine import Engine, settled
from coadvise.errors import UserError
from coadvise.jobs import train_in_processes
from coadvise.run import (
    DATA,
    TEACHER,
    Listener,
    Run,
    Silent,
    check_folder,
    check_space,
    open_record,
    owned,
    plan,
    summary_writer,
)  # fmt: skip
from coadvise.teachers import load_teachers


def fit(
    data: str | Path,
    preset: str | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    baseline: bool = False,
    seeds: int = 1,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    allow_changes: bool = False,
    listener: Listener | None = None,
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
        allow_changes: go on with a run of another configuration; what it has finished already stays as it is.
        listener: is told what happens.

    Returns:
        The run directory: config.yaml, data.json, metrics.jsonl, teachers/, students/, predictions/, report.html.

    Raises:
        UserError: anything the user can mend. Nothing is written before data and configuration have been checked.
        Interrupted: stopped by a signal; the same call goes on.
        StorageError: the run directory cannot be written any longer; what was saved is whole.
        LostProcessError: of several processes another one died or hangs.
    """
    if seeds < 1:
        raise UserError(f"seeds={seeds}; at least one student is needed")
    if jobs < 1:
        raise UserError(f"jobs={jobs}; at least one network must be trained at a time")
    listener = listener or Silent()
    preset = preset or default_preset(data)
    config = load_config(preset, overrides, seed, str(data))
    config = config.model_copy(update={"engine": settled(config.engine)})  # a run keeps the precision it began with
    folder = Path(out or f"runs/{Path(data).resolve().name}-{Path(preset).stem}-seed{config.seed}")
    changed = check_folder(folder, config, allow_changes)
    source = open_source(data, config.data.val_fraction, config.seed)
    engine = Engine(config.engine)
    dataset = audit(source, config.data.image_size, in_memory=config.in_memory)
    if not engine.is_main:  # one process speaks
        listener = Silent()
    for line in describe(dataset):
        listener.say(line)
    arms = plan(config, seeds, baseline)
    # a network that cannot be made, had, trained or saved is an error before anything is written
    check_space(folder, [check_arm(arm, folder, config, dataset, engine.processes) for arm in arms], jobs)
    summary_writer(config)

    with owned(folder, engine), engine.stops_gently(), engine.in_company():
        run = Run(folder, config, dataset, engine, open_record(folder, config, engine, listener.say), listener)
        run.describe([config.seed + n for n in range(seeds)], changed)
        listener.say(f"run directory: {folder}")
        for line in changed:
            listener.say(f"changed: {line}")
        for stage in ([a for a in arms if a.role == TEACHER], [a for a in arms if a.role != TEACHER]):
            if jobs > 1:
                train_in_processes(run, stage, jobs)
            else:
                for arm in stage:
                    train_arm(run, arm)
            if stage[0].role == TEACHER:
                run.teachers = load_teachers({arm.teacher: folder / arm.part for arm in stage}, dataset.classes)
        conclude(run, arms)
    return folder


def default_preset(data: str | Path) -> str:
    """`digits` for the digits, `small-images` up to 96 pixels, `photos` above."""
    if str(data) == DIGITS:
        return "digits"
    return "small-images" if typical_size(Path(data)) <= 96 else "photos"


def describe(dataset: Dataset) -> Iterator[str]:
    """The data in a few lines: classes, counts, sizes, the split, what cannot be read."""
    names = ", ".join(dataset.classes[:12]) + (", ..." if len(dataset.classes) > 12 else "")
    yield f"data: {dataset.source.root}, {len(dataset.classes)} classes ({names})"
    yield f"split: {dataset.source.note}"
    for name, split in (("train", dataset.train), ("validation", dataset.val)):
        counts = split.per_class(len(dataset.classes))
        widths, heights = zip(*split.sizes, strict=True)
        size = f"{min(widths)}x{min(heights)}" + (f" to {max(widths)}x{max(heights)}" if len(split.sizes) > 1 else "")
        yield f"{name}: {len(split)} images, {min(counts)} to {max(counts)} a class, {size} pixels"
        for fault in split.unreadable[:5]:
            yield f"  left out, cannot be read: {fault}"
        if len(split.unreadable) > 5:
            yield f"  and {len(split.unreadable) - 5} more; all are listed in {DATA}"
    if dataset.val.unreadable:
        yield f"scores are over the {len(dataset.val)} validation images that can be read"
