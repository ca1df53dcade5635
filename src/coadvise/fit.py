"""The main job: audit the data, train teachers, co-advise the student, train it alone, say whether advice helped."""

import fcntl
import json
import os
import platform
import socket
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from coadvise.checkpoint import MANIFEST, Checkpoints, write_text
from coadvise.config import RecipeConfig, RunConfig, TeacherConfig, differences, load_config, parse_config
from coadvise.data import draws
from coadvise.data.audit import Dataset, audit
from coadvise.data.loader import whole_batch
from coadvise.data.sources import DIGITS, open_source, typical_size
from coadvise.data.views import Views
from coadvise.engine import Engine
from coadvise.errors import UserError
from coadvise.evaluate import AVERAGE, correct, load_predictions, predict_logits, save_predictions, top1, top5
from coadvise.loss import CLASS, LossWeights
from coadvise.networks import Network, build_network, load_network, pretrained_classes
from coadvise.record import Recorder, last_of, read_records
from coadvise.report import write_report
from coadvise.speed import images_per_second
from coadvise.teachers import Teacher, Teachers, load_teachers
from coadvise.train import Training, train
from coadvise.verdict import Hits, comparison, sentence, spread

TEACHER, ADVISED, ALONE = "teacher", "advised", "alone"
CONFIG, DATA, LOCK = "config.yaml", "data.json", ".lock"
_KIND_NAMES = {"conv": "conv teacher", "inv": "involution teacher"}


class Listener(Protocol):
    """Where a run tells what it does."""

    def say(self, text: str) -> None: ...

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None: ...


class Silent:
    """The default of the Python interface."""

    def say(self, text: str) -> None:
        return

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        return


@dataclass(frozen=True)
class Arm:
    """One network of a run. `part` names it in the record and is its folder in the run directory."""

    part: str
    role: str
    seed: int
    teacher: str = ""

    @property
    def name(self) -> str:
        if self.role == TEACHER:
            return _KIND_NAMES.get(self.teacher, f"{self.teacher} teacher")
        return f"student {'co-advised' if self.role == ADVISED else 'alone'} (seed {self.seed})"


@dataclass
class Run:
    """All that the steps of the main job share."""

    folder: Path
    config: RunConfig
    dataset: Dataset
    engine: Engine
    record: Recorder
    listener: Listener
    teachers: Teachers = field(default_factory=lambda: Teachers({}))

    def checkpoints(self, arm: Arm) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints" / arm.part.replace("/", "."))


def fit(
    data: str | Path,
    preset: str | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    baseline: bool = False,
    seeds: int = 1,
    overrides: Sequence[str] = (),
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
        overrides: configuration changes, "a.b=c".
        listener: is told what happens.

    Returns:
        The run directory: config.yaml, data.json, metrics.jsonl, teachers/, students/, predictions/, report.html.

    Raises:
        UserError: anything the user can mend. Nothing is written before data and configuration have been checked.
        Interrupted: stopped by a signal; the same call goes on.
    """
    if seeds < 1:
        raise UserError(f"seeds={seeds}; at least one student is needed")
    listener = listener or Silent()
    preset = preset or default_preset(data)
    config = load_config(preset, overrides, seed, str(data))
    folder = Path(out or f"runs/{Path(data).resolve().name}-{Path(preset).stem}-seed{config.seed}")
    _check_folder(folder, config)
    source = open_source(data, config.data.val_fraction, config.seed)
    engine = Engine(config.engine)
    dataset = audit(source, config.data.image_size, in_memory=config.in_memory)
    if not engine.is_main:  # one process speaks
        listener = Silent()
    for line in describe(dataset):
        listener.say(line)
    arms = plan(config, seeds, baseline)
    for arm in arms:  # a network that cannot be made, had or trained is an error before anything is written
        if _trained_here(arm, config):
            _initial_network(arm, config, dataset.classes)
            recipe = _recipe(arm, config)
            whole_batch(recipe.batch_size, len(dataset.train), recipe.accumulate, engine.processes)
        elif not (folder / arm.part / MANIFEST).is_file():
            _check_given(arm, _given_teacher(config.teachers[arm.teacher], arm, config), config, dataset.classes)
    summary_writer = _summary_writer(config)

    folder.mkdir(parents=True, exist_ok=True)
    with _owned(folder, engine):
        also = _tensorboard(summary_writer(folder / "tensorboard")) if summary_writer and engine.is_main else None
        record = Recorder(folder, engine.is_main, listener.say, also)
        run = Run(folder, config, dataset, engine, record, listener)
        if engine.is_main:
            write_text(folder / CONFIG, config.to_yaml())
            write_text(folder / DATA, json.dumps(_data_record(dataset, config.data.image_size), indent=1))
        record.add("run", **_run_record(engine, [config.seed + n for n in range(seeds)]))
        listener.say(f"run directory: {folder}")
        for arm in arms:
            _train_arm(run, arm)
            if arm.role == TEACHER:
                run.teachers.by_token.update(load_teachers({arm.teacher: folder / arm.part}, dataset.classes).by_token)
        conclude(run, arms)
    return folder


def default_preset(data: str | Path) -> str:
    """`digits` for the digits, `small-images` up to 96 pixels, `photos` above."""
    if str(data) == DIGITS:
        return "digits"
    return "small-images" if typical_size(Path(data)) <= 96 else "photos"


def plan(config: RunConfig, seeds: int, baseline: bool) -> list[Arm]:
    """The networks a run trains, in order."""
    arms = [Arm(f"teachers/{name}", TEACHER, config.seed, name) for name in config.teachers]
    for seed in range(config.seed, config.seed + seeds):
        arms.append(Arm(f"students/advised-{seed}", ADVISED, seed))
        if baseline:
            arms.append(Arm(f"students/alone-{seed}", ALONE, seed))
    return arms


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


def _train_arm(run: Run, arm: Arm) -> None:
    """Trains one network to its end, scores it, records the result; what is done already is not done again."""
    folder, config = run.folder / arm.part, run.config
    if last_of(read_records(run.folder), "result", arm.part) and (folder / MANIFEST).is_file():
        run.listener.say(f"{arm.name}: done already")
        return
    if (folder / MANIFEST).is_file():
        network = load_network(folder)
    elif not _trained_here(arm, config):
        network = _given_teacher(config.teachers[arm.teacher], arm, config)
        if run.engine.is_main:
            network.save(folder)
    else:
        network = _initial_network(arm, config, run.dataset.classes)
        with run.engine.stops_gently():
            network = train(
                _job(run, arm, network), run.checkpoints(arm), run.engine, run.record, run.listener.progress
            )
        if run.engine.is_main:
            network.save(folder)
    run.engine.prepare(network)
    logits = predict_logits(network, run.dataset.val, config.data.image_size, run.engine, config.data.workers)
    trained = (CLASS, *config.teachers) if arm.role == ADVISED else (CLASS,)
    labels = torch.from_numpy(run.dataset.val.labels)
    scores = top1(logits, labels, trained)
    if run.engine.is_main:
        save_predictions(run.folder, arm.part, {name: logits[name] for name in trained}, labels)
        run.checkpoints(arm).remove()
    run.record.add(
        "result", part=arm.part, role=arm.role, name=arm.name, model=network.about["model"], seed=arm.seed, top1=scores,
        top5=top5(logits, labels), parameters=network.parameter_count,
    )  # fmt: skip
    run.listener.say(f"{arm.name}: top-1 " + ", ".join(f"{name} {value:.1%}" for name, value in scores.items()))
    run.engine.barrier()


def _job(run: Run, arm: Arm, network: Network) -> Training:
    config = run.config
    advised = arm.role == ADVISED
    teacher = config.teachers[arm.teacher] if arm.role == TEACHER else None
    seed = arm.seed if teacher is None else teacher_seed(config.seed, arm.teacher)
    augment = (teacher.augment if teacher else None) or config.augment
    return Training(
        part=arm.part,
        seed=seed,
        network=network,
        recipe=_recipe(arm, config),
        views=Views(run.dataset.train, augment, len(run.dataset.classes), config.data.image_size, seed),
        val=run.dataset.val,
        teachers=run.teachers if advised else Teachers({}),
        weights=config.loss_weights if advised else LossWeights(),
        workers=config.data.workers,
        checkpoint_seconds=config.engine.checkpoint_seconds,
    )


def _trained_here(arm: Arm, config: RunConfig) -> bool:
    return arm.role != TEACHER or config.teachers[arm.teacher].trained_here


def _recipe(arm: Arm, config: RunConfig) -> RecipeConfig:
    return config.teachers[arm.teacher].recipe if arm.role == TEACHER else config.student.recipe


def _initial_network(arm: Arm, config: RunConfig, classes: Sequence[str]) -> Network:
    """An untrained network; an advised student and the same one alone start from the same weights."""
    if arm.role == TEACHER:
        teacher = config.teachers[arm.teacher]
        return build_network(teacher, classes, config.data.image_size, teacher_seed(config.seed, arm.teacher))
    network = build_network(config.student, classes, config.data.image_size, arm.seed, tokens=tuple(config.teachers))
    if arm.role == ALONE:  # heads that nobody advises get no gradient
        for token in config.teachers:
            network.model.get_submodule(f"head_{token}").requires_grad_(False)
    return network


def teacher_seed(seed: int, name: str) -> int:
    """A teacher's own seed, so that two teachers of one architecture differ."""
    return draws.scalar_seed(seed, draws.TEACHER, 0, zlib.crc32(name.encode())) % 2**31


def _given_teacher(teacher: TeacherConfig, arm: Arm, config: RunConfig) -> Network:
    """A teacher from another run, or timm's pretrained weights, with the classes it was trained on."""
    if teacher.checkpoint is not None:
        return load_network(Path(teacher.checkpoint))
    return build_network(teacher, pretrained_classes(teacher.model), config.data.image_size, arm.seed, pretrained=True)


def _check_given(arm: Arm, network: Network, config: RunConfig, classes: tuple[str, ...]) -> None:
    """A given teacher must answer for the data's classes and take its images."""
    Teacher(arm.teacher, network, classes)
    if network.fixed_image_size and network.about["image_size"] != config.data.image_size:
        raise UserError(
            f"teacher '{arm.teacher}' takes images of {network.about['image_size']} pixels only, data.image_size is "
            f"{config.data.image_size}; give a teacher trained at that size, or none to have one trained here"
        )


def conclude(run: Run, arms: Sequence[Arm]) -> None:
    """Measures speed, compares, writes verdict and report."""
    if not run.engine.is_main:
        return
    results = {arm.part: last_of(read_records(run.folder), "result", arm.part) for arm in arms}
    networks = {arm.part: load_network(run.folder / arm.part) for arm in arms}
    for network in networks.values():
        run.engine.prepare(network)
    speeds = images_per_second(networks, run.config.data.image_size, run.engine)
    rows = _rows(arms, {part: result for part, result in results.items() if result}, speeds)
    advised, alone = _class_hits(run.folder, arms, ADVISED), _class_hits(run.folder, arms, ALONE)
    difference, text = None, "Trained without a baseline: run again with --baseline to learn whether advice helped."
    if alone:
        over_images, over_seeds = comparison(advised, alone)
        text = sentence(over_images, over_seeds, len(run.dataset.val))
        difference = {**asdict(over_images), "over": "images", "seeds": None}
        if over_seeds:
            difference["seeds"] = {**asdict(over_seeds), "n": len(alone)}
    seeds = sorted(advised)
    run.record.add("verdict", images=len(run.dataset.val), seeds=seeds, rows=rows, difference=difference, sentence=text)
    report = write_report(run.folder)
    for line in verdict_table(rows):
        run.listener.say(line)
    run.listener.say(text)
    run.listener.say(f"report: {report}")


def verdict_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The verdict's rows as aligned text."""
    yield f"{'':34} {'top-1':>8} {'± sd':>6} {'parameters':>11} {'images/s':>9}"
    for row in rows:
        sd = f"{100 * row['spread']:.1f}" if row["spread"] is not None else ""
        parameters, speed = row["parameters"] / 1e6, row["images_per_second"]
        yield f"{row['name']:34} {100 * row['top1']:7.1f}% {sd:>6} {parameters:9.2f} M {speed:9.0f}"


def _rows(
    arms: Sequence[Arm], results: Mapping[str, Mapping[str, Any]], speeds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a teacher, one for the student alone, one an answer of the co-advised student; means over seeds."""

    def row(name: str, same: Sequence[Arm], answer: str) -> dict[str, Any]:
        values = [results[arm.part]["top1"][answer] for arm in same]
        return {
            "name": name,
            "part": same[0].part,
            "answer": answer,
            "top1": sum(values) / len(values),
            "spread": spread(values),
            "parameters": results[same[0].part]["parameters"],
            "images_per_second": statistics.median(speeds[arm.part] for arm in same),
        }

    rows = [row(arm.name, [arm], CLASS) for arm in arms if arm.role == TEACHER]
    if alone := [arm for arm in arms if arm.role == ALONE]:
        rows.append(row("student alone", alone, CLASS))
    advised = [arm for arm in arms if arm.role == ADVISED]
    for answer in results[advised[0].part]["top1"]:
        what = answer if answer == AVERAGE else f"{answer} token"
        rows.append(row(f"student co-advised ({what})", advised, answer))
    return rows


def _class_hits(folder: Path, arms: Sequence[Arm], role: str) -> dict[int, Hits]:
    """Which validation images the class token answers rightly, by seed."""
    hits = {}
    for arm in arms:
        if arm.role == role:
            logits, labels = load_predictions(folder, arm.part)
            hits[arm.seed] = correct({CLASS: logits[CLASS]}, labels)[CLASS].numpy()
    return hits


def _check_folder(folder: Path, config: RunConfig) -> None:
    """A run directory is new, or holds this very run."""
    if (folder / CONFIG).is_file():
        changed = differences(parse_config(yaml.safe_load((folder / CONFIG).read_text())), config)
        if changed:
            raise UserError(
                f"'{folder}' holds another run; it differs in {'; '.join(changed[:6])}"
                + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")
                + "; choose another --out, or give the same data, preset and overrides to go on with it"
            )
    elif folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise UserError(f"'{folder}' exists and is no run directory; choose another --out")


@contextmanager
def _owned(folder: Path, engine: Engine) -> Iterator[None]:
    """Keeps a second program off the run directory; the lock of a program that died is free at once."""
    if not engine.is_main:
        yield
        return
    with (folder / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"'{folder}' is in use by {lock.read().strip()}; wait for it, or choose another --out"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _data_record(dataset: Dataset, image_size: int) -> dict[str, Any]:
    root, count = dataset.source.root, len(dataset.classes)
    splits = {
        name: {"images": len(split), "per_class": split.per_class(count), "unreadable": list(split.unreadable)}
        for name, split in (("train", dataset.train), ("val", dataset.val))
    }
    splits["val"]["paths"] = [
        os.fsencode(path.relative_to(root)).decode(errors="backslashreplace") for path in dataset.val.paths
    ]
    return {
        "root": str(root),
        "classes": list(dataset.classes),
        "image_size": image_size,
        "note": dataset.source.note,
        "splits": splits,
    }


def _run_record(engine: Engine, seeds: list[int]) -> dict[str, Any]:
    packages = ("torch", "timm", "torchvision", "lightning-fabric", "numpy")
    return {
        "version": version("coadvise"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": engine.describe(),
        "processes": engine.processes,
        "seeds": seeds,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _summary_writer(config: RunConfig) -> Callable[[Path], Any] | None:
    """TensorBoard's writer, where asked for. Raises UserError where it is not installed."""
    if not config.engine.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("engine.tensorboard=true needs TensorBoard; install coadvise[tensorboard]") from None
    return SummaryWriter


def _tensorboard(writer: Any) -> Callable[[dict[str, Any]], None]:
    """Hands every number of the record to TensorBoard as well."""

    def also(record: dict[str, Any]) -> None:
        for group in ("losses", "top1"):
            if record["kind"] in ("train", "eval"):
                for name, value in record.get(group, {}).items():
                    writer.add_scalar(f"{record['part']}/{group}/{name}", value, record["step"])

    return also
