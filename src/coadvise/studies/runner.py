"""Runs a study: every network of its table, what several rows share once, and what came of the paper's claims.

A study's folder holds `teachers/NAME-HASH/` and `students/HASH/`, each a run directory as `coadvise fit` makes them,
named by a hash of all that decides its numbers. So rows share teachers, no network is trained twice, not even for
another study in the same folder, and a study that was stopped goes on where it was.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from coadvise.advice import AVERAGE
from coadvise.config import CacheConfig, RunConfig, TeacherConfig, deciding_values, load_config, nearest, with_changes
from coadvise.data.scan import scan
from coadvise.data.sources import resolved, source_of
from coadvise.errors import UserError
from coadvise.runs.fit import default_preset, training
from coadvise.runs.foresight import foresee
from coadvise.runs.network_job import is_done
from coadvise.runs.parallel import check_jobs, in_processes
from coadvise.runs.plan import ADVISED, TEACHER, Part
from coadvise.runs.reuse import NO_STUDENT, by_itself, unadvising
from coadvise.runs.run import check_no_run
from coadvise.storage import contents, write_text
from coadvise.studies import STUDIES, Row, Study
from coadvise.studies.columns import Finished, check_shift, shifted
from coadvise.studies.result import draw, markdown, measured
from coadvise.training.engine import Engine, resolve_precision
from coadvise.training.listener import Listener, Silent


@dataclass(frozen=True)
class _Task:
    """A run directory to make: its configuration and the networks wanted of it.

    `cache` is the logit cache that advises its students, shared by all runs with these teachers and views.
    """

    folder: Path
    config: RunConfig
    parts: tuple[Part, ...]
    cache: Path | None = None

    @property
    def needs(self) -> list[Path]:
        """The run directories in which its teachers are made."""
        return [Path(t.checkpoint).parent.parent for t in self.config.teachers.values() if t.checkpoint is not None]


@dataclass(frozen=True)
class _Plan:
    """All runs of a study in the order in which they can be made, and the task of each row."""

    tasks: Mapping[Path, _Task]
    rows: Mapping[str, _Task]

    def shown_as(self, task: _Task) -> str:
        """The first row whose networks a task makes, and how many others'; empty for a teacher's that no row shows."""
        first, *others = [row for row, wanted in self.rows.items() if wanted == task] or [""]
        return f"{first} (and {len(others)} more)" if others else first


def run_study(
    name: str,
    data: str | Path,
    preset: str | None = None,
    seeds: int = 1,
    out: str | Path | None = None,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    listener: Listener | None = None,
    cache: bool = False,
    shifts: Sequence[str] = (),
    reuse: str | Path | None = None,
) -> dict[str, Any]:
    """Trains and compares all networks of a study, and writes `NAME.md` and `NAME.json` into its folder.

    A study of a figure of the paper writes `NAME.svg` as well.

    Args:
        name: a key of `coadvise.studies.STUDIES`.
        data, preset, jobs, overrides: as `coadvise.fit` takes them; the study's own changes come after the overrides.
        seeds: students a row, at consecutive seeds; teachers are trained once and shared.
        out: the study's folder, which several studies of the same data may share; studies/DATA when not given.
        cache: store the teachers' logits in the study's folder, so that students of the same teachers and views share
            one pass of the teachers, as `coadvise.fit` does with its `cache`.
        shifts: folders of other images of the same classes, ImageNet-A, -R and -C among them, on each of which all rows
            are scored as well, in a column of its own.
        reuse: as `coadvise.fit` takes it: networks of a run that `coadvise.fit` made, which are some of the study's.

    Returns:
        What the JSON file holds, see `study_result.measured`.

    Raises:
        UserError: no such study, a preset without the teachers that it needs, or images for `shifts` of other classes;
            otherwise as `coadvise.fit`.
        Interrupted: stopped by a signal; the same call goes on.
    """
    check_jobs(jobs)
    listener = listener or Silent()
    study, folder, plan = _prepare(name, data, preset, seeds, out, overrides, cache)
    given = next(iter(plan.tasks.values())).config
    engine = Engine(given.engine)
    if engine.processes > 1:
        raise UserError("a study runs in one process; leave torchrun out, and train several networks with --jobs")
    if shifts:  # before hours of training
        classes = source_of(given).classes
        for shift in shifts:
            check_shift(shift, classes, given.data.classes)
        study = replace(study, columns=(*study.columns, *map(shifted, shifts)))
    listener.say(f"{study.title}: {len(plan.tasks)} runs in {folder}")
    with engine:
        _train(plan, engine, jobs, listener, reuse)
        result = measured(study, {row.name: _finished(row, plan, folder) for row in study.rows}, engine, listener)
    write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    text = "\n".join(markdown(result)) + "\n"
    write_text(folder / f"{name}.md", text)
    if study.figure:
        write_text(folder / f"{name}.svg", draw(study, result))
    for line in text.splitlines():
        listener.say(line)
    return result


def _train(plan: _Plan, engine: Engine, jobs: int, listener: Listener, reuse: str | Path | None) -> None:
    """Makes all runs, teachers' first: several at a time, or of one run several of its networks."""
    names = {
        task.folder: plan.shown_as(task) or f"{task.parts[0].name} {task.folder.name}" for task in plan.tasks.values()
    }
    tasks = sorted(plan.tasks.values(), key=lambda task: any(part.role != TEACHER for part in task.parts))
    first = tasks[0]  # of runs on the same images one says what these are
    together = [task for task in tasks if not all(is_done(task.folder, part) for part in task.parts)]
    together = together[: len(together) - _one_by_one([_students_missing(task) for task in together], jobs)]
    if jobs > 1 and len(together) > 1:
        side_by_side = {names[t.folder]: partial(_make_here, t, names[t.folder], t == first, reuse) for t in together}
        after = {names[t.folder]: [names[folder] for folder in t.needs if folder in names] for t in together}
        in_processes(side_by_side, jobs, engine, listener, after)
        tasks = [task for task in tasks if task not in together]
    for task in tasks:  # also what is done: its predictions may be damaged
        _make(task, engine, jobs, names[task.folder], task == first, reuse, listener)


def _students_missing(task: _Task) -> int:
    return sum(part.role != TEACHER and not is_done(task.folder, part) for part in task.parts)


def _one_by_one(students: Sequence[int], jobs: int) -> int:
    """How many of the last runs are done sooner one after the other, each several students at a time.

    Args:
        students: that each run lacks; none where it lacks a teacher alone.
        jobs: networks that are trained at the same time. Of fewer runs than these, side by side, some of it is idle.
    """
    rest = sum(map(bool, students)) % jobs
    last = students[len(students) - rest :]
    return rest if last and sum(math.ceil(count / jobs) for count in last) < max(last) else 0


def _make(
    task: _Task, engine: Engine, jobs: int, name: str, introduce: bool, reuse: str | Path | None, listener: Listener
) -> None:
    heard, config = _Of(name, listener), task.config
    with training(config, task.folder, task.parts, engine, jobs, heard, task.cache, reuse=reuse, introduce=introduce):
        pass


def _make_here(task: _Task, name: str, introduce: bool, reuse: str | Path | None, listener: Listener) -> None:
    """In a process of its own."""
    with Engine(task.config.engine) as engine:
        _make(task, engine, 1, name, introduce, reuse, listener)


@dataclass(frozen=True)
class _Of:
    """A listener that hears whose words they are."""

    name: str
    listener: Listener

    def say(self, text: str) -> None:
        self.listener.say(f"{self.name}: {text}")

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.listener.progress(f"{self.name}: {part}", done, total, figures)


def _finished(row: Row, plan: _Plan, folder: Path) -> Finished:
    task = plan.rows[row.name]
    parts = tuple(part for part in task.parts if part.role == row.role)
    return Finished(task.folder, parts, row.answer, folder / "scores")


def foresee_study(
    name: str,
    data: str | Path,
    preset: str | None = None,
    seeds: int = 1,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    cache: bool = False,
) -> Iterator[tuple[str, float]]:
    """What `run_study` would train: (the network in words, the seconds it will take here); 0 where it is done.

    Evaluation, compiling and filling a cache are not counted. Views are timed as made from
    files, also where a run keeps presized images.
    """
    _, _, plan = _prepare(name, data, preset, seeds, out, overrides, cache)
    config = next(iter(plan.tasks.values())).config
    dataset = scan(source_of(config), config.data.image_size, in_memory=config.in_memory)
    with Engine(config.engine) as engine:
        for task in plan.tasks.values():
            for part, seconds in foresee(task.parts, task.folder, task.config, dataset, engine):
                yield f"{part.title}: {plan.shown_as(task) or task.folder.name}", seconds


# ---- planning ----


def _prepare(
    name: str, data: str | Path, preset: str | None, seeds: int, out: str | Path | None, overrides: Sequence[str],
    cache: bool,
) -> tuple[Study, Path, _Plan]:  # fmt: skip
    if name not in STUDIES:
        raise UserError(f"unknown study '{name}'{nearest(name, list(STUDIES))}; there are {', '.join(STUDIES)}")
    if seeds < 1:
        raise UserError(f"seeds={seeds}; at least one student a row is needed")
    config = load_config(preset or default_preset(data), overrides, None, str(data))
    config = config.model_copy(update={"engine": resolve_precision(config.engine)})
    if cache:
        config = config.model_copy(update={"cache": config.cache or CacheConfig()})
    folder = Path(out or f"studies/{Path(data).resolve().name}")
    check_no_run(folder, "choose another --out, or give it as --reuse to take its networks")
    return STUDIES[name], folder, _plan(STUDIES[name], config, seeds, folder)


def _plan(study: Study, base: RunConfig, seeds: int, folder: Path) -> _Plan:
    tasks: dict[Path, _Task] = {}
    rows: dict[str, _Task] = {}
    for row in study.rows:
        config = _configuration(row, base)
        if row.role == TEACHER:
            (name,) = config.teachers
            task = _teacher_task(name, config, folder)
            rows[row.name] = tasks.setdefault(task.folder, task)
            continue
        given: dict[str, TeacherConfig] = {}
        for name, teacher in config.teachers.items():
            given[name] = teacher
            if row.role == ADVISED and teacher.trained_here:
                task = _teacher_task(name, config, folder)
                tasks.setdefault(task.folder, task)
                given[name] = teacher.model_copy(update={"checkpoint": str(task.folder / "teachers" / name)})
        config = by_itself(config.model_copy(update={"teachers": given}), row.role)
        parts = [Part(f"students/{row.role}-{seed}", row.role, seed) for seed in range(base.seed, base.seed + seeds)]
        if row.role == ADVISED:
            parts = [Part(f"teachers/{name}", TEACHER, base.seed, name) for name in given] + parts
        place = folder / "students" / _hash(config, folder)
        tasks[place] = _Task(place, config, tuple(parts), _cache(config, folder))
        rows[row.name] = tasks[place]
    return _Plan(tasks, {name: tasks[task.folder] for name, task in rows.items()})


def _configuration(row: Row, base: RunConfig) -> RunConfig:
    """A row's configuration, its teachers not yet shared. "conv2" is a second one of the preset's "conv".

    Which tokens are advised is what the tables compare, so it is the row's to say and not the preset's.
    """
    teachers = {}
    for name in row.teachers or base.teachers:
        origin = name if name in base.teachers else re.sub(r"\d+$", "", name)
        if origin not in base.teachers:
            raise UserError(
                f"row '{row.name}' needs a teacher '{origin}', the preset has {', '.join(base.teachers)}; "
                "take a preset with teachers conv and inv"
            )
        teachers[name] = base.teachers[origin].model_copy(update={"token": None})
    config = base.model_copy(update={"teachers": teachers})
    config = with_changes(config, row.changes_of(config))
    if row.role == ADVISED and not config.loss_weights.trains_class:
        raise UserError(
            f"student.weight=0: the rows of a study say which tokens are advised, and in row '{row.name}' nothing would"
            " train the class token; give student.weight a value above 0"
        )
    trained = config.loss_weights.trained_tokens
    if row.answer not in (*trained, AVERAGE):
        raise UserError(
            f"row '{row.name}' is what token '{row.answer}' answers, and no teacher with a weight advises it; give "
            f"teachers.{row.answer}.weight a value above 0"
        )
    return config


def _teacher_task(name: str, config: RunConfig, folder: Path) -> _Task:
    """The run in which a teacher is trained, or had, by itself: nothing in it depends on whom it advises, or how."""
    alone = by_itself(config, TEACHER, name)
    place = folder / "teachers" / f"{name}-{_hash(alone, folder)}"
    return _Task(place, alone, (Part(f"teachers/{name}", TEACHER, config.seed, name),))


def _cache(config: RunConfig, folder: Path) -> Path | None:
    """Where the logits lie that advise a configuration's students: one place for equal teachers and views."""
    if config.cache is None:
        return None
    teachers = {name: unadvising(teacher) for name, teacher in config.teachers.items()}
    same = config.model_copy(update={"teachers": teachers, "student": NO_STUDENT})
    return folder / "logits" / _hash(same, folder)


def _hash(config: RunConfig, folder: Path) -> str:
    """Of all in a configuration that decides numbers, wherever the study's folder lies and from wherever it is run."""
    values = deciding_values(config)
    values["source"] = resolved(config.data.source)
    for given in (*values["teachers"].values(), values["student"]):
        for key in ("checkpoint", "start"):
            if given.get(key) is not None:
                path = Path(given[key])
                given[key] = str(path.relative_to(folder)) if path.is_relative_to(folder) else contents(path)
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
