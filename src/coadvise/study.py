"""Runs a study: every network of its table, what several rows share once, and what came of the paper's claims.

A study's folder holds `teachers/NAME-HASH/` and `students/HASH/`, each a run directory as `coadvise fit` makes them,
named by a hash of all that decides its numbers. So rows share teachers, no network is trained twice, not even for
another study in the same folder, and a study that was stopped goes on where it was.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coadvise.arm import initial_network, recipe_of
from coadvise.checkpoint import MANIFEST, write_text
from coadvise.config import CacheConfig, RunConfig, StudentConfig, TeacherConfig, load_config, nearest, with_changes
from coadvise.data.audit import Dataset, audit
from coadvise.data.loader import whole_batch
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.engine import Engine, settled
from coadvise.errors import UserError
from coadvise.evaluate import correct, load_predictions
from coadvise.fit import default_preset, training
from coadvise.record import last_of, read_records
from coadvise.run import ADVISED, ALONE, TEACHER, Arm, Listener, Silent
from coadvise.studies import STUDIES, Row, Study
from coadvise.verdict import Hits, comparison, spread

# In the run of a teacher by itself, and in that of a student alone, the other networks are never made.
_NO_STUDENT, _NO_TEACHER = StudentConfig(model="cit_micro_patch4_32"), TeacherConfig(model="resnet_small")


@dataclass(frozen=True)
class _Task:
    """A run directory to make: its configuration and the networks wanted of it.

    `cache` is the logit cache that advises its students, shared by all runs with these teachers and views.
    """

    folder: Path
    config: RunConfig
    arms: tuple[Arm, ...]
    cache: Path | None = None


@dataclass(frozen=True)
class _Plan:
    """All runs of a study in the order in which they can be made, and the task of each row."""

    tasks: Mapping[Path, _Task]
    rows: Mapping[str, _Task]


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
) -> dict[str, Any]:
    """Trains and compares all networks of a study, and writes `NAME.md` and `NAME.json` into its folder.

    Args:
        name: a key of `coadvise.studies.STUDIES`.
        data, preset, jobs, overrides: as `coadvise.fit` takes them; the study's own changes come after the overrides.
        seeds: students a row, at consecutive seeds; teachers are trained once and shared.
        out: the study's folder, which several studies of the same data may share; studies/DATA when not given.
        cache: store the teachers' logits in the study's folder, so that students of the same teachers and views share
            one pass of the teachers, as `coadvise.fit` does with its `cache`.

    Returns:
        What the JSON file holds: the title, rows (top-1 by seed, mean, spread, the paper's) and orders.

    Raises:
        UserError: no such study, or a preset without the teachers that it needs; otherwise as `coadvise.fit`.
        Interrupted: stopped by a signal; the same call goes on.
    """
    listener = listener or Silent()
    study, folder, plan = _prepare(name, data, preset, seeds, out, overrides, cache)
    listener.say(study.title)
    for number, task in enumerate(plan.tasks.values(), 1):
        rows = ", ".join(f"'{row}'" for row, wanted in plan.rows.items() if wanted == task) or "shared by rows"
        listener.say(f"run {number} of {len(plan.tasks)}: {rows}")
        with training(task.config, task.folder, task.arms, jobs, listener, task.cache):
            pass
    result = _result(study, plan)
    write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    text = "\n".join(_markdown(result)) + "\n"
    write_text(folder / f"{name}.md", text)
    for line in text.splitlines():
        listener.say(line)
    return result


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

    A step of each is timed, on this machine as it is now; evaluation and filling a cache are not counted.
    """
    _, _, plan = _prepare(name, data, preset, seeds, out, overrides, cache)
    dataset: Dataset | None = None
    seconds: dict[str, float] = {}  # of a kind of network, which seeds do not change
    for task in plan.tasks.values():
        config = task.config
        if dataset is None:
            source = open_source(config.data.source, config.data.val_fraction, config.seed)
            dataset = audit(source, config.data.image_size, in_memory=config.in_memory)
        for arm in task.arms:
            if arm.role == TEACHER and not config.teachers[arm.teacher].trained_here:
                continue
            kind = f"{task.folder.name}/{arm.role}"
            if (task.folder / arm.part / MANIFEST).is_file():
                seconds[kind] = 0.0
            elif not seconds.get(kind):
                seconds[kind] = _training_seconds(arm, config, dataset)
            rows = [row for row, wanted in plan.rows.items() if wanted == task]
            yield f"{arm.name}: {', '.join(rows) or task.folder.name}", seconds[kind]


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
    config = config.model_copy(update={"engine": settled(config.engine)})
    if cache:
        config = config.model_copy(update={"cache": config.cache or CacheConfig()})
    folder = Path(out or f"studies/{Path(data).resolve().name}")
    return STUDIES[name], folder, _plan(STUDIES[name], config, seeds, folder)


def _plan(study: Study, base: RunConfig, seeds: int, folder: Path) -> _Plan:
    tasks: dict[Path, _Task] = {}
    rows: dict[str, _Task] = {}
    for row in study.rows:
        config = _configuration(row, base)
        given: dict[str, TeacherConfig] = {}
        for name, teacher in config.teachers.items():
            if row.role == ALONE:
                given[name] = _NO_TEACHER.model_copy(update={"token": teacher.token})
            elif not teacher.trained_here:
                given[name] = teacher
            else:
                task = _teacher_task(name, config, folder)
                tasks.setdefault(task.folder, task)
                given[name] = teacher.model_copy(update={"checkpoint": str(task.folder / "teachers" / name)})
        if row.role == TEACHER:
            rows[row.name] = task
            continue
        asked = {} if row.role == ADVISED else {"cache": None}
        config = config.model_copy(update={"teachers": given, **asked})
        arms = [Arm(f"students/{row.role}-{seed}", row.role, seed) for seed in range(base.seed, base.seed + seeds)]
        if row.role == ADVISED:
            arms = [Arm(f"teachers/{name}", TEACHER, base.seed, name) for name in given] + arms
        place = folder / "students" / _hash(config, folder)
        known = tasks.get(place)
        arms += [arm for arm in (known.arms if known else ()) if arm not in arms]
        tasks[place] = _Task(place, config, tuple(arms), _cache(config, folder))
        rows[row.name] = tasks[place]
    return _Plan(tasks, {name: tasks[task.folder] for name, task in rows.items()})


def _configuration(row: Row, base: RunConfig) -> RunConfig:
    """A row's configuration, its teachers not yet shared. "conv2" is a second one of the preset's "conv"."""
    teachers = {}
    for name in row.teachers or base.teachers:
        origin = name if name in base.teachers else re.sub(r"\d+$", "", name)
        if origin not in base.teachers:
            raise UserError(
                f"row '{row.name}' needs a teacher '{origin}', the preset has {', '.join(base.teachers)}; "
                "take a preset with teachers conv and inv"
            )
        teachers[name] = base.teachers[origin]
    return with_changes(base.model_copy(update={"teachers": teachers}), row.changes)


def _teacher_task(name: str, config: RunConfig, folder: Path) -> _Task:
    """The run in which a teacher is trained by itself: nothing in it depends on whom it will advise, or how."""
    teacher = config.teachers[name]
    own = TeacherConfig(
        model=teacher.model,
        model_kwargs=teacher.model_kwargs,
        recipe=teacher.recipe,
        augment=teacher.augment or config.augment,
    )
    alone = config.model_copy(
        update={"teachers": {name: own}, "student": _NO_STUDENT, "augment": own.augment, "cache": None},
    )
    place = folder / "teachers" / f"{name}-{_hash(alone, folder)}"
    return _Task(place, alone, (Arm(f"teachers/{name}", TEACHER, config.seed, name),))


def _cache(config: RunConfig, folder: Path) -> Path | None:
    """Where the logits lie that advise a configuration's students: one place for equal teachers and views."""
    if config.cache is None:
        return None
    how = {"token": None, "weight": 1.0, "temperature": 1.0, "hard": False}  # they advise changes nothing they say
    teachers = {name: teacher.model_copy(update=how) for name, teacher in config.teachers.items()}
    same = config.model_copy(update={"teachers": teachers, "student": _NO_STUDENT})
    return folder / "logits" / _hash(same, folder)


def _hash(config: RunConfig, folder: Path) -> str:
    """Of a configuration, wherever the study's folder lies."""
    return hashlib.sha256(config.model_dump_json().replace(json.dumps(str(folder))[1:-1], "").encode()).hexdigest()[:12]


def _training_seconds(arm: Arm, config: RunConfig, dataset: Dataset) -> float:
    """How long an arm will train: its steps, by the second of two that are made and thrown away."""
    engine, recipe = Engine(config.engine), recipe_of(arm, config)
    views = Views(dataset.train, config.augment, len(dataset.classes), config.data.image_size, arm.seed)
    size = whole_batch(recipe.batch_size, len(views), recipe.accumulate, engine.processes) // recipe.accumulate
    network = initial_network(arm, config, dataset.classes)
    advisers = []
    if arm.role == ADVISED:
        trained = {name: t.model_copy(update={"checkpoint": None}) for name, t in config.teachers.items()}
        alike = config.model_copy(update={"teachers": trained})
        advisers = [initial_network(replace(arm, role=TEACHER, teacher=n), alike, dataset.classes) for n in trained]
    for module in (network, *advisers):
        engine.prepare(module)
    for adviser in advisers:
        adviser.requires_grad_(False).eval()
    for _ in range(2):
        engine.synchronise()
        began = time.perf_counter()
        batch = engine.place(views[0, np.arange(size)])
        with engine.autocast():
            for adviser in advisers:
                adviser(batch.images)
            answers = network.train()(batch.images)
        engine.backward(sum(logits.float().logsumexp(-1).mean() for logits in answers.values()))
        engine.synchronise()
        seconds = time.perf_counter() - began
    return seconds * recipe.accumulate * recipe.epochs * (len(views) // (size * recipe.accumulate))


# ---- what came of it ----


def _result(study: Study, plan: _Plan) -> dict[str, Any]:
    hits = {row.name: _hits(row, plan.rows[row.name]) for row in study.rows}
    rows = []
    for row in study.rows:
        top1 = {seed: float(values.mean()) for seed, values in hits[row.name].items()}
        rows.append(
            {
                "name": row.name,
                "top1": {str(seed): value for seed, value in top1.items()},
                "mean": sum(top1.values()) / len(top1),
                "spread": spread(list(top1.values())),
                "paper": row.paper,
                "run": str(plan.rows[row.name].folder),
            }
        )
    orders = []
    for order in study.orders:
        over_images, over_seeds = comparison(hits[order.higher], hits[order.lower])
        intervals = [interval for interval in (over_images, over_seeds) if interval]
        if all(i.low > 0 for i in intervals):
            finding = "held"
        elif all(i.high < 0 for i in intervals):
            finding = "not held"
        else:
            finding = "within noise"
        over = {"images": asdict(over_images), "seeds": asdict(over_seeds) if over_seeds else None}
        orders.append({**asdict(order), "finding": finding, "over": over})
    record = last_of(read_records(next(iter(plan.rows.values())).folder), "run") or {}
    made_by = {key: record.get(key) for key in ("time", "version", "versions", "device", "command")}
    return {"title": study.title, "rows": rows, "orders": orders, **made_by}


def _hits(row: Row, task: _Task) -> dict[int, Hits]:
    """Which validation images a row's answer gets right, by seed."""
    hits = {}
    for arm in task.arms:
        if arm.role == row.role:
            logits, labels = load_predictions(task.folder, arm.part)
            hits[arm.seed] = correct(logits, labels)[row.answer].numpy()
    return hits


def _markdown(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {result['title']}"
    yield ""
    yield "| row | top-1 | the paper, ImageNet-1k |"
    yield "| --- | --- | --- |"
    for row in result["rows"]:
        sd = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        paper = "-" if row["paper"] is None else f"{row['paper']:.1f} %"
        yield f"| {row['name']} | {100 * row['mean']:.1f}{sd} % | {paper} |"
    yield ""
    yield "| the paper has | above | here | difference, 95 % over images | over seeds |"
    yield "| --- | --- | --- | --- | --- |"
    for order in result["orders"]:
        images, seeds = (_points(order["over"][what]) for what in ("images", "seeds"))
        yield f"| {order['higher']} | {order['lower']} | {order['finding']} | {images} | {seeds} |"


def _points(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "-"
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
