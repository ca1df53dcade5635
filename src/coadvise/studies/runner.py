"""Runs a study: trains every network of its table, measures the columns and judges the paper's claims."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from coadvise.config.schema import RunConfig
from coadvise.data.scan import scan
from coadvise.data.scanned import Dataset
from coadvise.data.sources import short_name, source_of
from coadvise.errors import UserError
from coadvise.runs.estimate import Forecast, estimate, share_of_a_core
from coadvise.runs.executors.base import run_tasks
from coadvise.runs.executors.local import Local
from coadvise.runs.executors.places import cluster_of
from coadvise.runs.fit import describe, training
from coadvise.runs.network_job import check_part, is_done
from coadvise.runs.options import LOCAL, StudyOptions, help_text
from coadvise.runs.plan import TEACHER, RunPlan
from coadvise.runs.run import check_images, check_no_run
from coadvise.runs.schedule import at_once
from coadvise.storage import write_text
from coadvise.studies import Row, Study, study_named
from coadvise.studies.measures import Finished, check_shift, with_shifts
from coadvise.studies.plan import StudyPlan, plan_study, runs_of_teachers, study_config, study_folder
from coadvise.studies.question import COUNTED
from coadvise.studies.result import draw, markdown, measured
from coadvise.training.engine import Engine, resolve_auto
from coadvise.training.listener import Listener, Silent


def run_study(
    name: str, data: str | Path = "digits", listener: Listener | None = None, **options: Any
) -> dict[str, Any]:
    """Trains and compares all networks of a study. Writes `NAME.md` and `NAME.json`, and `NAME.svg` for a figure.

    The study's own changes to the configuration are applied after `overrides`.

    Args:
        name, data, options: the options below, the same as those of `coadvise study`.
        listener: receives progress and messages; silent if not given.

    Returns:
        What the JSON file holds, see `studies.result.measured`.

    Raises:
        UserError: no such study, a preset without the teachers that it needs, or images for `shifts` with other
            classes; otherwise as `coadvise.fit`.
        Interrupted: stopped by a signal; the same call continues.
    """
    return run_study_of(StudyOptions.of(name=name, data=data, **options), listener)


run_study.__doc__ = (run_study.__doc__ or "") + help_text(StudyOptions)


def run_study_of(options: StudyOptions, listener: Listener | None = None) -> dict[str, Any]:
    """Does what `run_study` promises."""
    config, study, plan = _planned(options)
    listener, folder = listener or Silent(), study_folder(options)
    engine = Engine(config.engine)
    if engine.processes > 1:
        raise UserError("a study runs in one process; leave out torchrun, and train several networks with --jobs")
    if options.shifts:  # before hours of training
        classes = source_of(config).classes
        for shift in options.shifts:
            check_shift(shift, classes, config.data.elsewhere())
        study = replace(study, columns=with_shifts(study.columns, options.shifts))
    listener.say(f"{study.title}: {len(plan.runs)} runs in {folder}")
    for of_paper, network in plan.networks.items():
        listener.say(f"in place of {of_paper}: {network}")
    with engine:
        if plan.runs and not options.so_far:
            _train(plan, engine, options, listener)
        finished = {row.name: _finished(row, plan.rows.get(row.name), folder) for row in study.rows}
        result = measured(study, finished, engine, listener)
    result = {
        "name": options.name,
        **result,
        "data": short_name(options.data),
        "networks": dict(plan.networks),
    }
    folder.mkdir(parents=True, exist_ok=True)  # without a run there may be none yet
    write_text(folder / f"{options.name}.json", json.dumps(result, indent=1) + "\n")
    text = "\n".join(markdown(result)) + "\n"
    write_text(folder / f"{options.name}.md", text)
    if study.figure:
        write_text(folder / f"{options.name}.svg", draw(study, result))
    for line in text.splitlines():
        listener.say(line)
    return result


def estimate_study(options: StudyOptions, say: Callable[[str], None], tell: Callable[[str, float], None]) -> Forecast:
    """How long a study will take here; see `runs.fit.estimate_fit`. Writes nothing."""
    config, _, plan = _planned(options)
    dataset = scan(source_of(config), config.data.image_size, config.in_memory, fit=config.data.fit)
    for line in describe(dataset):
        say(line)
    for shift in options.shifts:
        check_shift(shift, dataset.classes, config.data.elsewhere())
    total, datasets = 0.0, _datasets(plan, presized=False)
    with Engine(config.engine) as engine:
        jobs, share = _jobs(plan, engine, options), share_of_a_core(engine)
        for run in plan.runs.values():
            for part, seconds in estimate(replace(run, jobs=jobs), datasets[run.folder], engine):
                tell(f"{part.title}: {plan.title_of(run)}", seconds)
                total += seconds
        return Forecast(total / jobs, jobs, share())


def _jobs(plan: StudyPlan, engine: Engine, options: StudyOptions) -> int:
    return options.given_jobs or at_once(len(plan.runs), engine)


def _planned(options: StudyOptions) -> tuple[RunConfig, Study, StudyPlan]:
    config = study_config(options)
    check_no_run(study_folder(options), "choose another --out, or give it as --reuse to copy its networks")
    config = resolve_auto(config)  # networks keep the precision of their start
    study = study_named(options.name)
    study = study.of_paper() if options.paper_rows else study
    return config, study, plan_study(study, config, options)


def _train(plan: StudyPlan, engine: Engine, options: StudyOptions, listener: Listener) -> None:
    """Makes all runs, each after its teachers: several runs at a time, or several networks of one run."""
    jobs = _jobs(plan, engine, options)
    names = {run.folder: plan.title_of(run) for run in plan.runs.values()}
    datasets = _datasets(plan)
    introduced = {id(dataset): folder for folder, dataset in reversed(datasets.items())}  # by the first of its runs
    runs = [replace(run, introduce=run.folder in introduced.values()) for run in plan.runs.values()]
    outdated = {run.folder for run in runs if check_images(run.folder, datasets[run.folder], run.allow_changes)}
    _check_given(runs, datasets, engine)
    missing = [run for run in runs if run.folder in outdated or not all(is_done(run.folder, p) for p in run.parts)]
    on_cluster, together = options.on != LOCAL, missing
    if not on_cluster:
        together = missing[: len(missing) - _one_by_one([_students_missing(run) for run in missing], jobs)]
    if together and (on_cluster or (jobs > 1 and len(together) > 1)):
        tasks = {names[run.folder]: partial(_make_here, replace(run, jobs=1), names[run.folder]) for run in together}
        after = {names[r.folder]: [names[f] for f in runs_of_teachers(r) if f in names] for r in together}
        with cluster_of(options.on, study_folder(options), runs[0].config, engine, options.given_jobs) as cluster:
            if cluster:
                cluster.begin()
            run_tasks(tasks, cluster or Local(jobs, engine), engine, listener, after)
        runs = [run for run in runs if run not in together]
    for run in runs:  # also what is done: its predictions may be damaged
        _make(run, names[run.folder], engine, listener)


def _datasets(plan: StudyPlan, presized: bool = True) -> dict[Path, Dataset]:
    """The images of each run; runs of the same images share them.

    Args:
        presized: with the presized images that a run keeps.
    """
    scanned: dict[str, Dataset] = {}
    found = {}
    for folder, run in plan.runs.items():
        config = run.config
        which = f"{config.data.model_dump_json()} {config.in_memory}"
        if which not in scanned:
            data = config.data
            presize = data.presize if presized else 0
            scanned[which] = scan(source_of(config), data.image_size, config.in_memory, presize, fit=data.fit)
        found[folder] = scanned[which]
    return found


def _check_given(runs: Sequence[RunPlan], datasets: Mapping[Path, Dataset], engine: Engine) -> None:
    """Raises UserError, before any training, for given weights that cannot be loaded or are of other classes."""
    here = {run.folder for run in runs}
    for run in runs:
        for part in run.teachers:
            teacher = run.config.teachers[part.teacher]
            made_here = Path(str(teacher.start)).parent.parent in here
            if not teacher.trained_here and not made_here:
                check_part(part, run.folder, run.config, datasets[run.folder], engine)


def _students_missing(run: RunPlan) -> int:
    return sum(not is_done(run.folder, part) for part in run.students)


def _one_by_one(students: Sequence[int], jobs: int) -> int:
    """How many of the last runs finish sooner one after the other, each with several students at a time.

    Args:
        students: how many each run lacks; 0 if it lacks only a teacher.
        jobs: networks trained at the same time. With fewer runs than that side by side, some cores are idle.
    """
    rest = sum(map(bool, students)) % jobs
    last = students[len(students) - rest :]
    return rest if last and sum(math.ceil(count / jobs) for count in last) < max(last) else 0


def _make(run: RunPlan, name: str, engine: Engine, listener: Listener) -> None:
    with training(run, engine, _Prefixed(name, listener)):
        pass


def _make_here(run: RunPlan, name: str, listener: Listener) -> None:
    """In a process of its own."""
    with Engine(run.config.engine) as engine:
        _make(run, name, engine, listener)


@dataclass(frozen=True)
class _Prefixed:
    """A listener that adds a name to everything it passes on."""

    name: str
    listener: Listener

    def say(self, text: str) -> None:
        self.listener.say(f"{self.name}: {text}")

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.listener.progress(f"{self.name}: {part}", done, total, figures)


def _finished(row: Row, run: RunPlan | None, folder: Path) -> Finished:
    scores = folder / "scores"
    if run is None:
        return Finished(folder, (), row.answer, scores, row.network)
    role = TEACHER if row.role == COUNTED else row.role
    parts = tuple(part for part in run.parts if part.role == role and is_done(run.folder, part))
    return Finished(run.folder, parts, row.answer, scores, row.network)
