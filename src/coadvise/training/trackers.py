"""Trackers: TensorBoard, Weights & Biases and MLflow get a run's records after the first, as in `metrics.jsonl`.

One process writes, that of the command. A tracker that fails is dropped with a line, once, and training goes on. A run
that is resumed appends to the same tracked run, whose identity `trackers.json` keeps.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from coadvise.errors import UserError
from coadvise.storage import write_text

PROJECT = "coadvise"  # what W&B calls a project and MLflow an experiment
IDENTITIES = "trackers.json"  # in a run directory: the tracked run's identity, by tracker
FILES = ("report.html", "metrics.jsonl")  # attached to a run that has its verdict
_NOT_FIGURES = ("kind", "part", "seed", "step", "time")

Plain = Mapping[str, Any]


class Tracker(Protocol):
    """What receives a run."""

    def track(self, figures: Mapping[str, float], part: str, step: int | None) -> None:
        """Takes the numbers of a record, by their keys. `step` is None for those that come once."""

    def tell(self, name: str, text: str) -> None:
        """Takes a text: the verdict."""

    def attach(self, paths: Sequence[Path]) -> None:
        """Takes files of the run."""

    def close(self) -> None:
        """Writes what is buffered. Nothing follows."""


class _TensorBoard:
    """Events in the folder `tensorboard` of the run. TensorBoard keeps no files, so none are attached."""

    def __init__(self, run: Path, config: Plain, identity: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.identity = ""
        self.writer = SummaryWriter(run / "tensorboard")
        if identity is None:
            self.tell("config", f"```\n{yaml.safe_dump(dict(config), sort_keys=False)}```")

    def track(self, figures: Mapping[str, float], part: str, step: int | None) -> None:
        for key, value in figures.items():
            self.writer.add_scalar(f"{part}/{key}", value, step or 0)

    def tell(self, name: str, text: str) -> None:
        self.writer.add_text(name, text)

    def attach(self, paths: Sequence[Path]) -> None:
        pass

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A run of Weights & Biases, online or by `WANDB_MODE=offline`. Each network has an axis of its own steps."""

    def __init__(self, run: Path, config: Plain, identity: str | None) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run.name, dir=run, config=dict(config),
            id=identity, resume="allow", settings=wandb.Settings(silent=True),
        )  # fmt: skip
        self.identity = self.run.id
        self.parts: set[str] = set()

    def track(self, figures: Mapping[str, float], part: str, step: int | None) -> None:
        named = {f"{part}/{key}": value for key, value in figures.items()}
        if step is None:
            self.run.summary.update(named)
            return
        if part not in self.parts:
            self.parts.add(part)
            self.run.define_metric(f"{part}/*", step_metric=f"{part}/step")
        self.run.log({**named, f"{part}/step": step})

    def tell(self, name: str, text: str) -> None:
        self.run.summary[name] = text

    def attach(self, paths: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"run-{self.run.id}", type="run")
        for path in paths:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """A run of MLflow, in `MLFLOW_TRACKING_URI` or else in `mlflow.db` and `mlartifacts` of the run directory."""

    def __init__(self, run: Path, config: Plain, identity: str | None) -> None:
        from mlflow import MlflowClient

        here = run.absolute()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(uri or f"sqlite:///{here / 'mlflow.db'}")
        if identity is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self.client.get_experiment_by_name(name)
            place = None if uri else (here / "mlartifacts").as_uri()
            experiment = known.experiment_id if known else self.client.create_experiment(name, place)
            identity = self.client.create_run(experiment, run_name=run.name).info.run_id
            for key, value in _leaves(config):
                self.client.log_param(identity, key, value)
        else:
            self.client.update_run(identity, status="RUNNING")
        self.identity = identity

    def track(self, figures: Mapping[str, float], part: str, step: int | None) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(f"{part}/{key}", value, now, step or 0) for key, value in figures.items()]
        self.client.log_batch(self.identity, metrics)

    def tell(self, name: str, text: str) -> None:
        self.client.set_tag(self.identity, name, text)

    def attach(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self.client.log_artifact(self.identity, str(path))

    def close(self) -> None:
        self.client.set_terminated(self.identity)


# By the name of its package, which is also that of the extra.
_TRACKERS: dict[str, Callable[[Path, Plain, str | None], Any]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"engine.trackers: {name} is not installed; pip install 'coadvise[{name}]'")


class Trackers:
    """All trackers of a run.

    Args:
        names: of trackers.
        run: the run directory, which is there.
        config: as plain values.
        say: receives a line for each tracker that fails.
    """

    def __init__(self, names: Sequence[str], run: Path, config: Plain, say: Callable[[str], None]) -> None:
        self.run, self.say, self.concluded = run, say, False
        self.started: dict[str, Any] = {}  # by name
        path = run / IDENTITIES
        known = _identities(path)
        for name in names:
            self._attempt(name, partial(self._start, name, config, known.get(name)))
        now = known | {name: tracker.identity for name, tracker in self.started.items()}
        if now != known:
            write_text(path, json.dumps(now) + "\n")

    def track(self, record: Mapping[str, Any]) -> None:
        """Passes a record on."""
        part, figures = record.get("part", "run"), dict(_figures(record))
        if record["kind"] == "verdict":
            self.concluded, part = True, "verdict"
            self._each(lambda tracker: tracker.tell(part, str(record["sentence"])))
        if figures:
            self._each(lambda tracker: tracker.track(figures, part, record.get("step")))

    def close(self) -> None:
        """Attaches the report and the record of a run that has its verdict, and ends."""
        if self.concluded:
            self._each(lambda tracker: tracker.attach([self.run / name for name in FILES]))
        self._each(lambda tracker: tracker.close())
        self.started = {}

    def _start(self, name: str, config: Plain, identity: str | None) -> None:
        self.started[name] = _TRACKERS[name](self.run, config, identity)

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.started.items()):
            self._attempt(name, partial(do, tracker))

    def _attempt(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a server that is gone, a full disk, an account: training goes on
            self.started.pop(name, None)
            said = " ".join(str(error).split())[:200] or type(error).__name__
            self.say(f"{name}: {said}; the run goes on without it, and metrics.jsonl has all that it lacks")


def _identities(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: another tracked run is begun
        return {}


def _figures(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record: "losses/total", "top1/class"."""
    for key, value in _leaves({key: value for key, value in record.items() if key not in _NOT_FIGURES}):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


def _leaves(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested mappings by their path, with slashes."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value
