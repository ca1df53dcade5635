"""Measures the columns of a study's table: each a function of the finished networks of all rows."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coadvise.config import read_config
from coadvise.data.sources import evaluation_split
from coadvise.evaluation.agreement import TEACHERS, divergence_by_image
from coadvise.evaluation.scores import correct, load_predictions, log_probabilities
from coadvise.evaluation.shifts import FOLDER, IMAGENET_C, corrupted_splits, layout_of, subset_split
from coadvise.evaluation.speed import images_per_second
from coadvise.evaluation.verdict import ByImage
from coadvise.models.network import load_network
from coadvise.runs.evaluate import evaluate_run
from coadvise.runs.plan import ALONE, Part
from coadvise.runs.run import CONFIG, trained_parts, written_pictures
from coadvise.storage import MANIFEST, WEIGHTS, write_text
from coadvise.studies.columns import IMAGES, SEVERITIES, Column
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.metrics import last_of, read_records

Value = float | ByImage  # per validation image; the figure is their mean


@dataclass(frozen=True)
class Finished:
    """The trained networks of a row.

    Attributes:
        run: their run directory.
        parts: which of its networks they are, one a seed.
        answer: the output head, or "average".
        scores: a folder for what took minutes to measure.
    """

    run: Path
    parts: tuple[Part, ...]
    answer: str
    scores: Path


@dataclass(frozen=True)
class Context:
    """What a measure gets besides the rows: the column's argument, an entered engine, and a listener."""

    argument: str
    engine: Engine
    listener: Listener


Measure = Callable[[Sequence[Finished], Context], list[dict[int, Value]]]  # per row, by seed


def measure(column: Column, rows: Sequence[Finished], engine: Engine, listener: Listener) -> list[dict[int, Value]]:
    """Measures a column: for each row a figure by seed. One that no seed changes is given for the first seed alone."""
    return MEASURES[column.measure](rows, Context(column.argument, engine, listener))


def of_each(figure: Callable[[Finished, Part, Context], Value]) -> Measure:
    """A measure that looks at one network at a time."""

    def measured(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
        return [{part.seed: figure(row, part, context) for part in row.parts} for row in rows]

    return measured


def of_first(figure: Callable[[Finished, Part], Value]) -> Measure:
    """A measure that is the same for all seeds."""

    def measured(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
        return [{row.parts[0].seed: figure(row, row.parts[0])} for row in rows]

    return measured


def shifted(folder: str) -> Column:
    """Accuracy on other images of the same classes, or the mean corruption error if the folder is ImageNet-C."""
    name = Path(folder).resolve().name
    if layout_of(folder) == IMAGENET_C:
        note = f"{name}: at most {IMAGES} images of each corruption and severity; errors are not normalised."
        return Column(folder, f"mean corruption error, {name}", "corruption_error", folder, note=note)
    return Column(folder, f"top-1, {name}", "top1_on", folder)


def check_shift(folder: str, classes: Sequence[str], chosen: Sequence[str] = ()) -> None:
    """Raises UserError if networks with these classes cannot be scored on a folder, or on its chosen classes."""
    layout = layout_of(folder)
    if layout == IMAGENET_C:
        corrupted_splits(folder, classes, chosen)
    elif layout == FOLDER:
        evaluation_split(folder, classes, chosen)
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
    (teacher,) = (row for row in rows if row.parts[0].teacher == context.argument)
    wanted = _predicted(teacher, teacher.parts[0])
    return [{part.seed: (_predicted(row, part) == wanted).astype(float) for part in row.parts} for row in rows]


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


def _above_alone(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
    """By image and seed: a student's hits less those of the row in which the same model is trained alone."""
    models = [read_config(row.run / CONFIG).student.model for row in rows]
    hits = [{part.seed: _hits(row, part.name, row.answer).astype(float) for part in row.parts} for row in rows]
    alone = {model: own for model, row, own in zip(models, rows, hits, strict=True) if row.parts[0].role == ALONE}
    return [
        {seed: hit - alone[model][seed] for seed, hit in own.items()} for model, own in zip(models, hits, strict=True)
    ]


def _parameters(row: Finished, part: Part) -> Value:
    result = last_of(read_records(row.run), "result", part.name)
    assert result is not None
    return float(result["parameters"])


def _images_per_second(rows: Sequence[Finished], context: Context) -> list[dict[int, Value]]:
    """All rows in turn, at the same time and place; nothing is kept."""
    config = read_config(rows[0].run / CONFIG)
    networks = {}
    for number, row in enumerate(rows):
        networks[str(number)] = load_network(row.run / row.parts[0].name).for_inference()
        context.engine.prepare(networks[str(number)])
    speeds = images_per_second(networks, config.data.image_size, context.engine)
    return [{row.parts[0].seed: speeds[str(number)]} for number, row in enumerate(rows)]


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
    pictures = hashlib.sha256("\n".join(written_pictures(row.run).get("val", ())).encode()).hexdigest()
    request = {"data": folder, **options, "weights": weights, "pictures": pictures}
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


MEASURES: Mapping[str, Measure] = {
    "top1": of_each(_top1),
    "teacher_top1": of_first(_teachers_hits),
    "above_teacher": of_each(_above_teacher),
    "above_alone": _above_alone,
    "kl": of_each(_kl),
    "same_answer": _same_answer,
    "parameters": of_first(_parameters),
    "images_per_second": _images_per_second,
    "corruption_error": of_each(_corruption_error),
    "top1_on": of_each(_top1_on),
}
