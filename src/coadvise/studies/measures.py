"""Measures the columns of a study's table: each a function of the finished networks of all rows."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coadvise.config.reading import read_config
from coadvise.config.schema import DataConfig, ModelConfig
from coadvise.data.scan import scan_split
from coadvise.data.sources import evaluation_split, source_of
from coadvise.data.sources.split import evenly
from coadvise.evaluation.agreement import TEACHERS, divergence_by_image
from coadvise.evaluation.attention import MOST, overlap_by_image
from coadvise.evaluation.scores import correct, load_predictions, log_probabilities
from coadvise.evaluation.shifts import FOLDER, IMAGENET_C, corrupted_splits, layout_of, subset_split
from coadvise.evaluation.speed import images_per_second
from coadvise.evaluation.verdict import ByImage
from coadvise.models.network import Network, build_network, load_network, on_meta
from coadvise.runs.evaluate import evaluate_run
from coadvise.runs.plan import ADVISED, ALONE, Part
from coadvise.runs.run import CONFIG, trained_parts, with_resolved_source, written_pictures
from coadvise.storage import MANIFEST, WEIGHTS, write_text
from coadvise.studies.columns import CORRUPTION_ERROR, IMAGES, SEVERITIES, SPEED_BATCH, SPEED_SIZE, Column
from coadvise.studies.networks import PAPER_MODELS
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener

Value = float | ByImage  # per validation image; the figure is their mean


@dataclass(frozen=True)
class Finished:
    """The trained networks of a row.

    Attributes:
        run: their run directory; only needed if there are some.
        parts: which of its networks they are, one a seed; none for a network that is only counted and timed.
        answer: the output head, or "average".
        scores: a folder for what took minutes to measure.
        network: the paper's network to count and time, a key of `PAPER_MODELS`.
    """

    run: Path
    parts: tuple[Part, ...]
    answer: str
    scores: Path
    network: str = ""


@dataclass(frozen=True)
class Context:
    """What a measure gets besides the rows: the column's argument, an entered engine, and a listener."""

    argument: str
    engine: Engine
    listener: Listener


Measure = Callable[[Sequence[Finished], Context], list[dict[int, Value]]]  # per row, by seed


def measure(column: Column, rows: Sequence[Finished], engine: Engine, listener: Listener) -> list[dict[int, Value]]:
    """Measures a column: for each row a figure by seed, none where it cannot be measured.

    One that no seed changes is given for a single seed.
    """
    return MEASURES[column.measure](rows, Context(column.argument, engine, listener))


def of_each(figure: Callable[[Finished, Part, Context], Value]) -> Measure:
    """A measure that looks at one network at a time."""

    def measured(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
        return [{part.seed: figure(row, part, context) for part in row.parts} for row in rows]

    return measured


def of_first(figure: Callable[[Finished, Part], Value]) -> Measure:
    """A measure that is the same for all seeds."""

    def measured(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
        return [{part.seed: figure(row, part) for part in row.parts[:1]} for row in rows]

    return measured


def with_shifts(columns: Sequence[Column], shifts: Sequence[str]) -> tuple[Column, ...]:
    """Fills the columns for ImageNet-A, -R and -C from the given folders; other folders get a column of their own."""
    found = list(columns)
    for folder in shifts:
        layout, name = layout_of(folder), Path(folder).resolve().name
        if layout == IMAGENET_C:
            note = f"{name}: at most {IMAGES} images of each corruption and severity; errors are not normalised."
            wanted = replace(CORRUPTION_ERROR, argument=folder, note=note)
        else:
            wanted = Column(layout.replace("-", "_"), f"top-1, {name}", "top1_on", folder)
        places = [number for number, column in enumerate(found) if column.name == wanted.name]
        if places:
            found[places[0]] = replace(wanted, heading=found[places[0]].heading)
        else:
            found.append(replace(wanted, name=folder))
    return tuple(found)


def check_shift(folder: str, classes: Sequence[str], how: DataConfig) -> None:
    """Raises UserError if networks with these classes cannot be scored on a folder, or on those of its classes."""
    layout = layout_of(folder)
    if layout == IMAGENET_C:
        corrupted_splits(folder, classes, how)
    elif layout == FOLDER:
        evaluation_split(folder, classes, how)
    else:
        subset_split(folder, layout, classes)


def _top1(row: Finished, part: Part, context: Context) -> Value:
    return _hits(row, part.name, row.answer)


def _above_teacher(row: Finished, part: Part, context: Context) -> Value:
    return _hits(row, part.name, row.answer) - _teachers_hits(row, part)


def _kl(row: Finished, part: Part, context: Context) -> Value:
    advice, logits = (load_predictions(row.run, name)[0] for name in (TEACHERS + context.argument, part.name))
    return divergence_by_image(log_probabilities(logits)[row.answer], advice["class"]).numpy()


def _same_answer(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
    teacher = next((row for row in rows if [part.teacher for part in row.parts] == [context.argument]), None)
    if teacher is None:  # not trained yet
        return [{} for _ in rows]
    wanted = _predicted(teacher, teacher.parts[0])
    return [{part.seed: (_predicted(row, part) == wanted).astype(float) for part in row.parts} for row in rows]


def _overlap(row: Finished, part: Part, context: Context) -> Value:
    """Of the two tokens that teachers advise."""
    config = with_resolved_source(row.run, read_config(row.run / CONFIG))
    source, size = source_of(config), config.data.image_size
    network = load_network(row.run / part.name)
    rows = evenly(len(source.scored), MOST)
    some = scan_split(source.scored.subset(rows), size, False, config.data.fit, network.values)
    one, other = config.teachers
    return overlap_by_image(network, some, (one, other), context.argument)


def _hits(row: Finished, part: str, answer: str) -> ByImage:
    logits, labels = load_predictions(row.run, part)
    return correct(logits, labels)[answer].numpy()


def _predicted(row: Finished, part: Part) -> ByImage:
    """The predicted class of each image, by its index."""
    return log_probabilities(load_predictions(row.run, part.name)[0])[row.answer].argmax(-1).numpy()


def _teachers_hits(row: Finished, part: Part) -> Value:
    """The mean over teachers if a row has several."""
    parts = [part for part in trained_parts(row.run) if part.startswith(TEACHERS)]
    return np.mean([_hits(row, part, "class") for part in parts], axis=0)


def paper_network(name: str) -> Network:
    """A network of the paper as published: for images of 224 pixels and 1000 classes, with random weights."""
    classes = [str(number) for number in range(1000)]
    return build_network(ModelConfig(model=PAPER_MODELS[name]), classes, SPEED_SIZE, seed=0)


def _parameters(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
    networks = [on_meta(partial(paper_network, row.network)) for row in rows]
    return [{0: float(sum(weights.numel() for weights in network.parameters()))} for network in networks]


def _images_per_second(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
    """All networks in turn, at the same time and place; nothing is kept."""
    names = dict.fromkeys(row.network for row in rows)
    context.listener.say(f"timing {len(names)} networks, {SPEED_BATCH} images of {SPEED_SIZE} pixels at a time")
    networks = {name: paper_network(name).for_inference() for name in names}
    for network in networks.values():
        context.engine.prepare(network)
    speeds = images_per_second(networks, SPEED_SIZE, context.engine, SPEED_BATCH)
    return [{0: speeds[row.network]} for row in rows]


def over_alone(figure: Callable[[Finished, Part], ByImage]) -> Measure:
    """A measure of advised students by what the student alone of the same seed, in the row before, is right about."""

    def measured(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
        found: list[dict[int, Value]] = []
        for before, row in zip([rows[0], *rows], rows, strict=False):
            alone = {part.seed: part for part in before.parts if part.role == ALONE}
            advised = [part for part in row.parts if part.role == ADVISED and part.seed in alone]
            found.append(
                {
                    p.seed: figure(row, p).astype(float) - _hits(before, alone[p.seed].name, before.answer)
                    for p in advised
                }
            )
        return found

    return measured


def _better_teachers_hits(row: Finished, part: Part) -> ByImage:
    hits = [_hits(row, name, "class") for name in trained_parts(row.run) if name.startswith(TEACHERS)]
    return max(hits, key=np.mean)


def _not_measured(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
    return [{} for _ in rows]


def _corruption_error(row: Finished, part: Part, context: Context) -> Value:
    """From ImageNet-C's files, or from the validation images under the same corruptions, made here."""
    found = _rescored(row, context)["corruptions"]["parts"]
    return found[part.name][row.answer]["mean_corruption_error"]


def _top1_on(row: Finished, part: Part, context: Context) -> Value:
    return _rescored(row, context)["parts"][part.name][row.answer]["top1"]


def _rescored(row: Finished, context: Context) -> Mapping[str, Any]:
    """Scores all networks of a run. The result is kept as long as weights, images and request are the same."""
    folder = context.argument or None
    weights = {
        part: json.loads((row.run / part / MANIFEST).read_text())["files"][WEIGHTS]["sha256"]
        for part in trained_parts(row.run)
    }
    options: dict[str, Any] = {"images": IMAGES, "corruptions": True, "severities": SEVERITIES}
    if folder is not None:
        options = {"images": IMAGES if layout_of(folder) == IMAGENET_C else None}
    *_, scored = [[], *written_pictures(row.run).values()]
    pictures = hashlib.sha256("\n".join(scored).encode()).hexdigest()
    request = {"data": folder and _listing(Path(folder)), **options, "weights": weights, "pictures": pictures}
    digest = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]
    path = row.scores / f"{row.run.name}-{digest}.json"
    try:
        return json.loads(path.read_text())["found"]
    except (OSError, ValueError):
        pass  # not measured yet, or only partly written
    context.listener.say(f"scoring {row.run.name} on {folder or 'corrupted validation images'}")
    found = evaluate_run(row.run, folder, listener=context.listener, engine=context.engine, **options)
    for fault in found["unreadable"]:
        context.listener.say(f"not scored, cannot be read: {fault}")
    row.scores.mkdir(exist_ok=True)
    write_text(path, json.dumps({"request": request, "found": found}) + "\n")
    return found


def _listing(folder: Path) -> str:
    """Another text where a folder, or a file in it, is another."""
    found = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.resolve().rglob("*"))
    return hashlib.sha256(json.dumps([str(folder.resolve()), found]).encode()).hexdigest()


MEASURES: dict[str, Measure] = {
    "top1": of_each(_top1),
    "teacher_top1": of_first(_teachers_hits),
    "above_teacher": of_each(_above_teacher),
    "gain": over_alone(lambda row, part: _hits(row, part.name, row.answer)),
    "lead": over_alone(_better_teachers_hits),
    "kl": of_each(_kl),
    "same_answer": _same_answer,
    "overlap": of_each(_overlap),
    "parameters": _parameters,
    "images_per_second": _images_per_second,
    "corruption_error": of_each(_corruption_error),
    "top1_on": of_each(_top1_on),
    "not_measured": _not_measured,
}
