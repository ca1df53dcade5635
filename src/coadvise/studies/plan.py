"""Which runs a study needs: rows that can share a network do. Planning imports nothing heavy.

A study's folder holds `teachers/NAME-HASH/` and `students/HASH/`, each a run directory as `coadvise fit` makes it,
named by a hash of everything that decides its results. So rows share teachers, no network is trained twice, not even
for another study in the same folder, and a stopped study continues.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from coadvise.advice import AVERAGE, CLASS
from coadvise.config.reading import deciding_values, with_cache, with_changes
from coadvise.config.schema import ModelConfig, RunConfig, TeacherConfig, names_model
from coadvise.data.sources import resolved, short_name, source_of
from coadvise.errors import UserError
from coadvise.runs.canonical import NO_STUDENT, canonical_config, strip_advice
from coadvise.runs.options import StudyOptions
from coadvise.runs.plan import ADVISED, TEACHER, Part, RunPlan, configured
from coadvise.studies import Row, Study, study_named
from coadvise.studies.networks import (
    PAPER_MODELS,
    STUDENT,
    TEACHERS,
    check_paper_size,
    student_changes,
    teacher_config,
)
from coadvise.studies.question import COUNTED

PRETRAINED = "pretrained"  # as --weights: those that timm publishes
ENDINGS = (".safetensors", ".pth", ".pt", ".bin")  # of files of weights


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study.

    Attributes:
        runs: by folder, in an order in which they can be made.
        rows: the run of each row; a row whose network is only counted and timed has none.
        networks: what stands in for the paper's networks, by their names.
    """

    runs: Mapping[Path, RunPlan]
    rows: Mapping[str, RunPlan]
    networks: Mapping[str, str] = field(default_factory=dict)

    def title_of(self, run: RunPlan) -> str:
        """The first row that shows networks of a run, and the number of further rows."""
        first, *others = [row for row, wanted in self.rows.items() if wanted == run] or [""]
        if not first:  # a teacher that no row shows
            return f"{run.parts[0].name} {run.folder.name}"
        return f"{first} (and {len(others)} more)" if others else first


def study_folder(options: StudyOptions) -> Path:
    return options.out or Path("studies", short_name(options.data))


def study_config(options: StudyOptions) -> RunConfig:
    """The configuration before the study's own changes. Raises UserError for input that cannot be used."""
    study_named(options.name)
    _, config, _ = configured(options)
    if options.cache:
        config = with_cache(config)
    if options.networks == "paper":
        check_paper_size(config.data.image_size)
    if options.weights not in (None, PRETRAINED):
        _check_weights(Path(options.weights))
    return config


def plan_study(study: Study, config: RunConfig, options: StudyOptions) -> StudyPlan:
    """Plans all runs of a study.

    Args:
        config: as `study_config` gives it, with a definite precision.
    """
    return _Planner(study_folder(options), config, options).plan(study)


def runs_of_teachers(run: RunPlan) -> list[Path]:
    """The run directories in which the teachers of a run are made."""
    return [Path(str(t.start)).parent.parent for t in run.config.teachers.values() if not t.trained_here]


@dataclass(frozen=True)
class _Planner:
    folder: Path
    base: RunConfig
    options: StudyOptions

    def plan(self, study: Study) -> StudyPlan:
        runs: dict[Path, RunPlan] = {}
        rows: dict[str, Path] = {}
        networks: dict[str, str] = {}
        for row in study.rows:
            for run in self.runs_for(row, study):
                runs.setdefault(run.folder, run)
                rows[row.name] = run.folder  # the last one; the others are of its teachers
            networks |= self.stand_ins(row, study)
        if self.options.weights is not None and not any(self.has_given_weights(run) for run in runs.values()):
            raise UserError(
                f"--weights: no network of {self.options.name} takes any: it varies how they train, or it trains this "
                "preset's own; give weights to table2 or table3, or add --networks paper"
            )
        return StudyPlan(runs, {row: runs[folder] for row, folder in rows.items()}, networks)

    def paper(self, row: Row, study: Study) -> Mapping[str, str] | None:
        return {**study.networks, **row.networks} if self.options.networks == "paper" else None

    def only_counted(self, row: Row) -> bool:
        return row.role == COUNTED or (row.paper_only and self.options.networks != "paper")

    @cached_property
    def largest_class(self) -> int:
        """Its number of training images."""
        data = self.base.data.model_copy(update={"per_class": None})
        labels = source_of(self.base.model_copy(update={"data": data})).train.labels
        return int(np.bincount(labels).max())

    def with_useful_limit(self, config: RunConfig) -> RunConfig:
        """The same images without a limit that leaves out none of them, so that rows of all images are one."""
        if config.data.per_class is None or config.data.per_class < self.largest_class:
            return config
        return config.model_copy(update={"data": config.data.model_copy(update={"per_class": None})})

    def stand_ins(self, row: Row, study: Study) -> dict[str, str]:
        """What is trained for a row in place of the paper's networks."""
        if self.options.networks == "paper" or self.only_counted(row):
            return {}
        config, found = row_config(row, self.base), dict[str, str]()
        for name, teacher in config.teachers.items():
            if not TEACHERS[name].again:
                found[study.networks.get(name, TEACHERS[name].paper)] = f"{name} ({_network(teacher)})"
        if row.role != TEACHER and config.student.model == self.base.student.model:
            own = "_aligned_" in config.student.model  # has stems unless the configuration takes them away
            stems = "" if config.student.model_kwargs.get("aligned", own) else ", tokens not aligned"
            found[study.networks.get(STUDENT, "Transformer-Ti")] = f"student ({_network(config.student)}{stems})"
        return found

    def weights_of(self, model: str) -> dict[str, object]:
        """The part of a teacher's configuration that gives its weights, if --weights has some for this model."""
        given = self.options.weights
        if given is None:
            return {}
        if given == PRETRAINED:
            from coadvise.models.pretrained import has_weights  # imports torch, and few studies are given weights

            return {"start": model, "adapt": "none"} if has_weights(model) else {}
        for ending in ENDINGS:
            if (path := Path(given) / f"{model}{ending}").is_file():
                return {"start": str(path), "adapt": "none"}
        return {}

    def has_given_weights(self, run: RunPlan) -> bool:
        teachers = run.config.teachers.values()
        return any(t.start is not None and not Path(str(t.start)).is_relative_to(self.folder) for t in teachers)

    def runs_for(self, row: Row, study: Study) -> list[RunPlan]:
        """The run of a row, after those of its teachers."""
        if self.only_counted(row):
            model = PAPER_MODELS[row.network]
            if not (weights := self.weights_of(model)):
                return []
            teacher = TeacherConfig(model=model).model_copy(update=weights)
            return [self.teacher_run(model, self.base.model_copy(update={"teachers": {model: teacher}}))]
        config = self.with_useful_limit(row_config(row, self.base, self.paper(row, study)))
        given_weights = {
            name: teacher.model_copy(update=self.weights_of(teacher.model))
            for name, teacher in config.teachers.items()
            if teacher.trained_here and not teacher.model_kwargs and study.figure is None  # they vary training
        }
        config = config.model_copy(update={"teachers": {**config.teachers, **given_weights}})
        if row.role == TEACHER:
            (name,) = config.teachers
            return [self.teacher_run(name, config)]
        teachers, given = list[RunPlan](), dict[str, TeacherConfig]()
        for name, teacher in config.teachers.items():
            given[name] = teacher
            if row.role == ADVISED and teacher.trained_here:
                teachers.append(run := self.teacher_run(name, config))
                start = str(run.folder / "teachers" / name)
                given[name] = teacher.model_copy(update={"start": start, "adapt": "none"})
        config = canonical_config(config.model_copy(update={"teachers": given}), row.role)
        first, seeds = self.base.seed, self.options.seeds
        parts = [Part(f"students/{row.role}-{seed}", row.role, seed) for seed in range(first, first + seeds)]
        if row.role == ADVISED:
            parts = [Part(f"teachers/{name}", TEACHER, first, name) for name in given] + parts
        folder = self.folder / "students" / config_hash(config, self.folder)
        return [*teachers, self.run(folder, config, parts, self.cache_of(config))]

    def teacher_run(self, name: str, config: RunConfig) -> RunPlan:
        """The run of one teacher: nothing in it depends on which token it advises, or how."""
        alone = canonical_config(config, TEACHER, name)
        folder = self.folder / "teachers" / f"{name}-{config_hash(alone, self.folder)}"
        return self.run(folder, alone, [Part(f"teachers/{name}", TEACHER, config.seed, name)])

    def run(self, folder: Path, config: RunConfig, parts: list[Part], cache: Path | None = None) -> RunPlan:
        given = self.options
        return RunPlan(folder, config, tuple(parts), cache, given.reuse, given.given_jobs, given.allow_changes)

    def cache_of(self, config: RunConfig) -> Path | None:
        """The folder of the logits that advise a run's students: the same for equal teachers and views."""
        if config.cache is None:
            return None
        teachers = {name: strip_advice(teacher) for name, teacher in config.teachers.items()}
        same = config.model_copy(update={"teachers": teachers, "student": NO_STUDENT})
        return self.folder / "logits" / config_hash(same, self.folder)


def row_config(row: Row, base: RunConfig, paper: Mapping[str, str] | None = None) -> RunConfig:
    """A row's configuration, before its teachers are shared.

    Tables compare which tokens are advised, so the row decides that and not the preset.

    Args:
        paper: for the paper's own networks: see `teacher_config`.
    """
    student = base.student.model_copy(update={"label_tokens": (CLASS,)})
    teachers = {name: teacher_config(name, base, paper) for name in row.teachers}
    config = base.model_copy(update={"teachers": teachers, "student": student})
    if paper is not None:
        config = with_changes(config, student_changes(config, paper.get(STUDENT, "Transformer-Ti")))
    config = with_changes(config, row.changes_of(config))
    weights = config.loss_weights if row.role == ADVISED else config.loss_weights.without_advice
    if row.role == ADVISED and not config.loss_weights.trains_class:
        raise UserError(
            f"student.weight=0: no teacher advises the class token in row '{row.name}', so nothing trains it; give "
            "student.weight a value above 0"
        )
    if row.answer not in (*weights.trained_tokens, AVERAGE):
        raise UserError(
            f"row '{row.name}' scores token '{row.answer}', which no teacher with a weight advises; give "
            f"teachers.{row.answer}.weight a value above 0"
        )
    return config


def _check_weights(folder: Path) -> None:
    """Raises UserError for a folder without weights of any network of the paper."""
    if not any((folder / f"{model}{ending}").is_file() for model in PAPER_MODELS.values() for ending in ENDINGS):
        raise UserError(
            f"--weights {folder} has no weights of the paper's networks; give a folder of files named by timm's names, "
            f"such as resnet50.pth or rednet101.safetensors, or '{PRETRAINED}' for those that timm publishes"
        )


def _network(config: ModelConfig) -> str:
    depths = config.model_kwargs.get("depths")
    return f"{config.model}, blocks {depths}" if depths else config.model


def config_hash(config: RunConfig, folder: Path) -> str:
    """A hash of everything that decides results, independent of where the study lies and the working directory."""
    values = deciding_values(config)
    values["source"] = resolved(config.data.source)
    for given in (*values["teachers"].values(), values["student"]):
        start = given.get("start")
        if isinstance(start, str) and not names_model(start):
            path = Path(start)
            given["start"] = str(path.relative_to(folder)) if path.is_relative_to(folder) else _contents(path)
    values["teachers"] = {name: _as_first_written(teacher) for name, teacher in values["teachers"].items()}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def _as_first_written(teacher: dict[str, Any]) -> dict[str, Any]:
    """A teacher with the keys from before `start`, so that networks of that time are found."""
    if teacher.get("adapt", "none") != "none":
        return teacher
    start = teacher.get("start")
    published = start is not None and start == teacher["model"]
    old = {"checkpoint": None if published else start, "pretrained": published}
    return {
        key: value
        for own in teacher
        if own not in ("start", "adapt")
        for key, value in ({own: teacher[own]} | (old if own == "recipe" else {})).items()
    }


def _contents(path: Path) -> str:
    from coadvise.storage import contents  # imports torch, and few studies have given weights

    return contents(path)
