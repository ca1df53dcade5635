"""A run: what its networks share, and the directory that holds them."""

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coadvise.advice import AVERAGE, CLASS
from coadvise.config.reading import HARMLESS_KEYS, differences, read_config
from coadvise.config.schema import AugmentConfig, ImageSize, RunConfig, plain_size
from coadvise.data.balance import class_weights
from coadvise.data.quarantine import Quarantine
from coadvise.data.scan import scan
from coadvise.data.scanned import Changes, Dataset, changes_of
from coadvise.data.sources import is_here, resolved, source_of
from coadvise.data.views import Views
from coadvise.distill.logit_cache import LogitCache, fingerprint, seed_folder
from coadvise.distill.teachers import Teachers, load_teachers
from coadvise.errors import UserError
from coadvise.models.network import Network
from coadvise.models.tokens import TokenModel
from coadvise.runs.lock import LOCK
from coadvise.runs.plan import Part
from coadvise.storage import MANIFEST, bytes_text, contents, storing, write_lines, write_text
from coadvise.training.checkpoint import KEEP, Checkpoints
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.metrics import Recorder, last_of, read_records
from coadvise.training.trackers import Trackers

CONFIG, DATA, PICTURES = "config.yaml", "data.json", "pictures.tsv"
TASKS = ".tasks"  # while a cluster trains, see `executors/cluster.py`
IDENTITY = "pictures"  # in data.json
SPLIT_WORDS = {"train": "training", "val": "validation", "test": "test"}  # what the user reads
_BEGUN = (LOCK, f".{CONFIG}.part", TASKS)  # all that a run leaves which was killed while it began


@dataclass
class Run:
    """All that the steps of the main job share.

    `cache` is the logit cache that advises its students; None: its teachers do so themselves.
    """

    folder: Path
    config: RunConfig
    dataset: Dataset
    engine: Engine
    record: Recorder
    listener: Listener
    cache: Path | None = None

    def teacher_folder(self, name: str) -> Path:
        return self.folder / "teachers" / name

    def load_teachers(self) -> Teachers:
        """The run's finished teachers, prepared for the engine."""
        folders = {name: self.teacher_folder(name) for name in self.config.teachers}
        teachers = load_teachers(folders, self.dataset.classes)
        for teacher in teachers.by_name.values():
            self.engine.prepare(teacher)
        return teachers

    def student_views(self, seed: int) -> Views:
        """What students of a seed are trained on, advised or alone."""
        return self.views(self.config.augment, seed)

    def views(self, augment: AugmentConfig, seed: int) -> Views:
        """Training views; classes of unequal size come as often as `data.balance` says."""
        size, classes = self.config.data.image_size, len(self.dataset.classes)
        sampled = self._class_weights if self.config.data.balance == "sampler" else None
        return Views(self.dataset.train, augment, classes, size, seed, sampled, self.config.data.views == "device")

    @property
    def loss_class_weights(self) -> Tensor | None:
        """How much each class counts in the cross-entropy, [K] on the engine's device."""
        weights = self._class_weights if self.config.data.balance == "loss" else None
        return None if weights is None else torch.tensor(weights, device=self.engine.device)

    @property
    def _class_weights(self) -> tuple[float, ...] | None:
        classes = self.dataset.classes
        return class_weights(self.config.data, classes, self.dataset.train.per_class(len(classes)))

    def checkpoints(self, part: Part) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints" / part.name.replace("/", "."))

    def logit_cache(self, seed: int) -> LogitCache:
        """The cache of one seed's views."""
        assert self.cache is not None
        teachers = {name: self.teacher_folder(name) for name in self.config.teachers}
        return LogitCache(seed_folder(self.cache, seed), fingerprint(self.config, self.dataset, teachers, seed))

    def describe(self, seeds: list[int], changed: list[str]) -> None:
        """Writes what the run is: configuration, data and machine. `changed` lists what differs from its last start."""
        if self.engine.is_main:
            write_text(self.folder / CONFIG, self.config.to_yaml())
            about = data_record(self.dataset, self.config.data.image_size) | {IDENTITY: identity(self.dataset)}
            if written_data(self.folder) != about:
                write_lines(self.folder / PICTURES, picture_list(self.dataset))
                write_text(self.folder / DATA, json.dumps(about, indent=1))
            Quarantine(self.folder, self.dataset.train, self.config.data.max_unreadable).begin()
        cache = str(self.cache) if self.cache else None
        self.record.add("run", **made_here(self.engine), seeds=seeds, changed=changed, cache=cache)


# ---- the directory ----


def check_folder(folder: Path, config: RunConfig, allow_changes: bool) -> list[str]:
    """Checks that a run directory is new or holds this run. Returns what differs in the configuration.

    Raises:
        UserError: it holds something else, another configuration without `allow_changes`, or a link that leads out.
    """
    if folder.exists() and (
        not folder.is_dir()
        or not ((folder / CONFIG).is_file() or all(path.name in _BEGUN for path in folder.iterdir()))
    ):
        raise UserError(f"'{folder}' exists and is no run directory; choose another --out")
    inside = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_relative_to(folder / "wandb"):  # its client links to logs of its own
            continue
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            raise UserError(f"{str(path)!r} leads out of the run directory, and a run writes nowhere else; remove it")
    if not (folder / CONFIG).is_file():
        return []
    old = _written_config(folder / CONFIG)
    if old.cache is not None and config.cache is None and not allow_changes:
        raise UserError(
            f"the students in '{folder}' are advised by stored logits; continue with --cache DIR (logits that are not "
            "there are computed again), or choose another --out"
        )
    changed = differences(_with_current_paths(folder, old, config), config)
    important = [line for line in changed if line.partition(":")[0] not in HARMLESS_KEYS]
    if important and not allow_changes:
        raise UserError(
            f"'{folder}' holds another run; it differs in {'; '.join(important[:6])}"
            + (f" and {len(important) - 6} more" if len(important) > 6 else "")
            + "; choose another --out, or give the same data, preset and overrides to continue that run, or "
            "--allow-changes to continue it with these"
        )
    return changed


def check_run(folder: Path, instead: str = "give the folder that 'coadvise fit' printed") -> None:
    """Raises UserError if a folder is no run directory, and says what to give instead."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"'{folder}' is no run directory (no {CONFIG}); {instead}")


def check_no_run(folder: Path, instead: str) -> None:
    """Raises UserError if a folder is a run directory, which holds nothing else, and says what to give instead."""
    if (folder / CONFIG).is_file():
        raise UserError(f"'{folder}' is a run directory of 'coadvise fit'; {instead}")


def _with_current_paths(folder: Path, old: RunConfig, new: RunConfig) -> RunConfig:
    """The old configuration, with the paths of `new` where both lead to the same data or the same teacher.

    A path may be written differently, or be relative to another working directory.
    """
    data, teachers = old.data, dict(old.teachers)
    if written_data(folder).get("folder") == resolved(new.data.source):
        data = data.model_copy(update={"source": new.data.source})
    for name in teachers.keys() & new.teachers.keys():
        before, now = teachers[name].start, new.teachers[name].start
        if before and now and before != now and contents(folder / "teachers" / name) == contents(Path(now)):
            teachers[name] = teachers[name].model_copy(update={"start": now})
    return old.model_copy(update={"data": data, "teachers": teachers})


def _written_config(path: Path) -> RunConfig:
    try:
        return read_config(path)
    except UserError as error:
        raise UserError(
            f"'{path}' is damaged or from another version: {error}; restore it, or choose another --out"
        ) from None


def check_space(folder: Path, checkpoints: list[int], jobs: int) -> None:
    """Raises UserError, before training, if the disk cannot hold what training writes.

    Args:
        checkpoints: size of one checkpoint of each network, bytes.
        jobs: networks that are trained at the same time.
    """
    together = sum(sorted(checkpoints)[-jobs:])
    # While one is written there is one more than are kept. Final weights take at most half of a checkpoint.
    needed = (KEEP + 1) * together + sum(checkpoints) // 2
    there = sum(path.stat().st_size for path in folder.rglob("*.*") if path.is_file())
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    if free + there < needed:
        raise UserError(
            f"'{folder}' needs {bytes_text(max(checkpoints))} a checkpoint, {bytes_text(needed)} in all; "
            f"{bytes_text(free)} are free on its disk; free some space, or choose another --out"
        )


@contextmanager
def tracked(run: Run) -> Iterator[Trackers]:
    """The trackers of the configuration, which get every record of the run from now on."""
    names = run.config.engine.trackers if run.engine.is_main else ()
    trackers = Trackers(names, run.folder, run.config.model_dump(mode="json"), run.listener.say)
    run.record.followers.append(trackers.track)
    try:
        yield trackers
    finally:
        trackers.close()


# ---- its images ----


def data_record(dataset: Dataset, image_size: ImageSize) -> dict[str, Any]:
    """What `data.json` holds of a run's images."""
    count = len(dataset.classes)
    splits = {
        name: {"images": len(split), "per_class": split.per_class(count), "unreadable": list(split.unreadable)}
        for name, split in dataset.splits.items()
    }
    splits[dataset.scored_name]["paths"] = dataset.scored.split.names()
    return {
        "root": dataset.source.where,
        "folder": resolved(dataset.source.where),  # where a relative root was
        "classes": list(dataset.classes),
        "image_size": plain_size(image_size),
        **dataset.train.preprocessing,
        "note": dataset.source.note,
        "splits": splits,
    }


def written_data(folder: Path) -> dict[str, Any]:
    """What a run's `data.json` holds; nothing if it cannot be read."""
    try:
        data = json.loads((folder / DATA).read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def with_resolved_source(folder: Path, config: RunConfig) -> RunConfig:
    """The configuration of the run in `folder`, with its data folder as an absolute path.

    If that folder is gone the configuration stays: everything may have been moved, with a relative path still right.
    """
    there = written_data(folder).get("folder")
    if not isinstance(there, str) or not is_here(there):
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"source": there})})


def picture_list(dataset: Dataset) -> Iterator[str]:
    """The lines of `pictures.tsv`: the split of every image, a tab, and its digest, label and name."""
    for name, split in dataset.splits.items():
        yield from (f"{name}\t{line}" for line in split.listing())


def identity(dataset: Dataset) -> dict[str, str]:
    """What tells without reading `pictures.tsv` whether the images are those of a run."""
    return {name: split.identity for name, split in dataset.splits.items()}


def written_pictures(folder: Path) -> dict[str, list[str]]:
    """The lines of a run's `pictures.tsv` by split; empty if there is none."""
    try:
        lines = (folder / PICTURES).read_text().split("\n")
    except FileNotFoundError:
        return {}
    pairs = [line.partition("\t") for line in lines if line]
    splits = ("train", "val", *(["test"] if any(name == "test" for name, *_ in pairs) else []))
    return {split: [line for name, _, line in pairs if name == split] for split in splits}


def image_changes(folder: Path, dataset: Dataset) -> dict[str, Changes]:
    """How the images differ from those that the run in `folder` began with, by split; empty if they do not."""
    if (folder / PICTURES).is_file() and written_data(folder).get(IDENTITY) == identity(dataset):
        return {}
    found = {}
    for name, old in written_pictures(folder).items():
        new = [*dataset.splits[name].listing()] if name in dataset.splits else []
        if old != new:
            found[name] = changes_of(old, new)
    return found


def check_images(folder: Path, dataset: Dataset, allow_changes: bool = False) -> dict[str, Changes]:
    """Returns `image_changes`. Raises UserError, naming what changed, if there are some and they are not allowed."""
    changes = image_changes(folder, dataset)
    if changes and not allow_changes:
        raise UserError(
            f"the images changed since '{folder}' began: {'; '.join(image_change_lines(changes))}; restore them, or "
            "choose another --out, or train again what they affect by --allow-changes"
        )
    return changes


def own_pictures(folder: Path, config: RunConfig) -> Dataset:
    """The pictures of a run. Raises UserError if they are not at hand or have changed since."""
    config = with_resolved_source(folder, config)
    dataset = scan(source_of(config), config.data.image_size, config.in_memory, fit=config.data.fit)
    if changes := image_changes(folder, dataset):
        raise UserError(
            f"the data changed since '{folder}' was trained: {' and '.join(image_change_lines(changes))}; restore them"
        )
    return dataset


def image_change_lines(changes: dict[str, Changes]) -> list[str]:
    return [f"{SPLIT_WORDS[split]} images: {change}" for split, change in changes.items()]


def discard_outdated(run: Run, changes: dict[str, Changes]) -> None:
    """Removes what comes from images that have changed since, so that it is made again.

    Changed training images affect every network of the run and every stored logit, changed validation images the
    scores. `pictures.tsv` is written afterwards: a run that is killed in between is still refused.
    """
    if run.engine.is_main and changes:
        parts = {record["part"] for record in read_records(run.folder) if "part" in record}
        outdated = ["predictions", "report.html"]
        if "train" in changes:
            outdated += ["teachers", "students", "checkpoints"]
            for place in {run.cache or run.folder / "cache", run.folder / "cache"}:
                for cache in sorted(place.glob("seed-*")):
                    LogitCache(cache, {}).reset()
        for part in parts:
            run.record.rewind(part, -1 if "train" in changes else sys.maxsize)
        with storing(run.folder):
            for name in outdated:
                path = run.folder / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
    run.engine.barrier()


def made_here(engine: Engine) -> dict[str, Any]:
    """Which program of which versions makes something now, on what."""
    packages = ("torch", "timm", "torchvision", "lightning-fabric", "numpy")
    program = Path(sys.argv[0]).name
    return {
        "version": version("coadvise"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": engine.describe(),
        "processes": engine.processes,
        "command": shlex.join(["coadvise" if program == "__main__.py" else program, *sys.argv[1:]]),  # -m coadvise
    }


# ---- its finished networks ----


def trained_tokens(run: Path, part: str, network: Network) -> tuple[str, ...]:
    """The output heads of a network that were trained, as its result says.

    A student alone has heads that no teacher advised, and so has one whose teachers have no weight.
    """
    if result := last_of(read_records(run), "result", part):
        return tuple(name for name in result["top1"] if name != AVERAGE)
    model = network.model
    if part.startswith("students/advised") and isinstance(model, TokenModel):
        return (CLASS, *model.token_names)
    return (CLASS,)


def trained_parts(run: Path) -> list[str]:
    """The finished networks of a run: teachers first, then students."""
    return [
        str(folder.parent.relative_to(run))
        for kind in ("teachers", "students")
        for folder in sorted((run / kind).glob(f"*/{MANIFEST}"), key=lambda p: _by_seed(p.parent.name))
        if not folder.parent.name.startswith(".")  # one that is being written
    ]


def _by_seed(name: str) -> tuple[str, int, str]:
    """Sorts advised-2 before advised-10, and both before alone-2."""
    return name.rstrip("0123456789"), len(name), name
