"""What a study's table has in its columns: each one function of the finished networks of all rows."""

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
from coadvise.runs.run import CONFIG, trained_parts
from coadvise.storage import MANIFEST, WEIGHTS, write_text
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.metrics import last_of, read_records

# Corruptions are made and answered for 45 times: so much of them is enough for a table, and minutes on a CPU.
SEVERITIES, IMAGES = (1, 3, 5), 1000

Value = float | ByImage  # by validation image, the figure is the mean


@dataclass(frozen=True)
class Finished:
    """A row's trained networks.

    Attributes:
        run: their run directory.
        parts: which of its networks they are, one a seed.
        answer: the token that answers, or "average".
        scores: a folder for what took minutes to measure.
    """

    run: Path
    parts: tuple[Part, ...]
    answer: str
    scores: Path


Measure = Callable[[Sequence[Finished], Engine, Listener], list[dict[int, Value]]]  # by row, then by seed


@dataclass(frozen=True)
class Column:
    """A figure of every row.

    Attributes:
        name: its key in the JSON file, in `Row.paper` and in `Order.column`.
        heading: as the table shows it, with its unit where that is no percent sign.
        measure: a figure that does not depend on the seed is given for the first seed alone.
        scale, digits, unit: how a figure is shown.
        note: what has to be said below the table.
    """

    name: str
    heading: str
    measure: Measure
    scale: float = 100.0
    digits: int = 1
    unit: str = " %"
    note: str = ""


def of_each(figure: Callable[[Finished, Part, Engine, Listener], Value]) -> Measure:
    """A measure that looks at one network at a time."""

    def measure(rows: Sequence[Finished], engine: Engine, listener: Listener) -> list[dict[int, Value]]:
        return [{part.seed: figure(row, part, engine, listener) for part in row.parts} for row in rows]

    return measure


def of_first(figure: Callable[[Finished, Part], Value]) -> Measure:
    """A measure of what networks of all seeds have in common."""

    def measure(rows: Sequence[Finished], engine: Engine, listener: Listener) -> list[dict[int, Value]]:
        return [{row.parts[0].seed: figure(row, row.parts[0])} for row in rows]

    return measure


def kl_to(teacher: str) -> Column:
    """KL(teacher ‖ answer) on the validation images, as `coadvise evaluate` gives it."""

    def figure(row: Finished, part: Part, engine: Engine, listener: Listener) -> Value:
        advice, answers = (load_predictions(row.run, part)[0] for part in (TEACHERS + teacher, part.name))
        return divergence_by_image(log_probabilities(answers)[row.answer], advice["class"]).numpy()

    return Column(f"kl_{teacher}", f"KL from the {teacher} teacher, nats", of_each(figure), 1, 3, "")


def same_answer(teacher: str) -> Column:
    """Share of the validation images to which a row gives the answer of this teacher, itself a row."""

    def measure(rows: Sequence[Finished], engine: Engine, listener: Listener) -> list[dict[int, Value]]:
        (of,) = (row for row in rows if row.parts[0].teacher == teacher)
        said = _answers(of, of.parts[0])
        return [{part.seed: (_answers(row, part) == said).astype(float) for part in row.parts} for row in rows]

    return Column(f"same_as_{teacher}", f"same answer as the {teacher} teacher", measure)


def shifted(folder: str) -> Column:
    """Accuracy on other images of the same classes, or the mean corruption error where the folder is ImageNet-C."""
    name = Path(folder).resolve().name
    if layout_of(folder) == IMAGENET_C:
        note = f"{name}: at most {IMAGES} images of each corruption and severity; errors are not normalised."
        return Column(folder, f"mean corruption error, {name}", _corruption_error(folder), note=note)

    def figure(row: Finished, part: Part, engine: Engine, listener: Listener) -> Value:
        return _rescored(row, folder, engine, listener)["parts"][part.name][row.answer]["top1"]

    return Column(folder, f"top-1, {name}", of_each(figure))


def check_shift(folder: str, classes: Sequence[str], chosen: Sequence[str] = ()) -> None:
    """Raises UserError where networks that know these classes cannot be scored on a folder, or its chosen classes."""
    layout = layout_of(folder)
    if layout == IMAGENET_C:
        corrupted_splits(folder, classes, chosen)
    elif layout == FOLDER:
        evaluation_split(folder, classes, chosen)
    else:
        subset_split(folder, layout, classes)


def _hits(row: Finished, part: str, answer: str) -> ByImage:
    logits, labels = load_predictions(row.run, part)
    return correct(logits, labels)[answer].numpy()


def _answers(row: Finished, part: Part) -> ByImage:
    """The class that is answered, by its index."""
    return log_probabilities(load_predictions(row.run, part.name)[0])[row.answer].argmax(-1).numpy()


def _teachers_hits(row: Finished, part: Part) -> Value:
    """The mean where a row has several teachers."""
    parts = [part for part in trained_parts(row.run) if part.startswith(TEACHERS)]
    return np.mean([_hits(row, part, "class") for part in parts], axis=0)


def _above_alone(rows: Sequence[Finished], engine: Engine, listener: Listener) -> list[dict[int, Value]]:
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


def _images_per_second(rows: Sequence[Finished], engine: Engine, listener: Listener) -> list[dict[int, Value]]:
    """All rows in turn, at the same time and place, so nothing of it is kept."""
    config = read_config(rows[0].run / CONFIG)
    networks = {}
    for number, row in enumerate(rows):
        networks[str(number)] = load_network(row.run / row.parts[0].name).for_inference()
        engine.prepare(networks[str(number)])
    speeds = images_per_second(networks, config.data.image_size, engine)
    return [{row.parts[0].seed: speeds[str(number)]} for number, row in enumerate(rows)]


def _corruption_error(folder: str | None) -> Measure:
    """Of ImageNet-C's files, or of the validation images under the same corruptions made here."""

    def figure(row: Finished, part: Part, engine: Engine, listener: Listener) -> Value:
        found = _rescored(row, folder, engine, listener)["corruptions"]["parts"]
        return found[part.name][row.answer]["mean_corruption_error"]

    return of_each(figure)


def _rescored(row: Finished, folder: str | None, engine: Engine, listener: Listener) -> Mapping[str, Any]:
    """What `evaluate_run` finds of all networks of a run, kept as long as weights and request are the same."""
    weights = {
        part: json.loads((row.run / part / MANIFEST).read_text())["files"][WEIGHTS]["sha256"]
        for part in trained_parts(row.run)
    }
    options: dict[str, Any] = {"images": IMAGES, "corruptions": True, "severities": SEVERITIES}
    if folder is not None:
        options = {"images": IMAGES if layout_of(folder) == IMAGENET_C else None}
    request = {"data": folder, **options, "weights": weights}
    digest = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]
    path = row.scores / f"{row.run.name}-{digest}.json"
    try:
        return json.loads(path.read_text())["found"]
    except (OSError, ValueError):
        pass  # not measured yet, or written by half
    listener.say(f"scoring {row.run.name} on {folder or 'corrupted validation images'}")
    found = evaluate_run(row.run, folder, listener=listener, engine=engine, **options)
    for fault in found["unreadable"]:
        listener.say(f"not scored, cannot be read: {fault}")
    row.scores.mkdir(exist_ok=True)
    write_text(path, json.dumps({"request": request, "found": found}) + "\n")
    return found


TOP1 = Column("top1", "top-1", of_each(lambda row, part, engine, listener: _hits(row, part.name, row.answer)))
TEACHER_TOP1 = Column("teacher_top1", "the teacher's top-1", of_first(_teachers_hits))
ABOVE_TEACHER = Column(
    "above_teacher", "top-1 above the teacher's",
    of_each(lambda row, part, engine, listener: _hits(row, part.name, row.answer) - _teachers_hits(row, part)),
    note="Top-1 above the teacher's: where it falls as teachers get better, students gain less than they.",
)  # fmt: skip
ABOVE_ALONE = Column("above_alone", "top-1 above alone", _above_alone)
PARAMETERS = Column("parameters", "parameters, M", of_first(_parameters), 1e-6, 2, "")
SPEED = Column(
    "images_per_second", "images/s", _images_per_second, 1, 0, "",
    note="Images/s: of the class token's answer, batches of 64, all networks in turn on this machine.",
)  # fmt: skip
CORRUPTION_ERROR = Column(
    "corruption_error", "mean corruption error", _corruption_error(None),
    note="Mean corruption error: not normalised, the validation images (at most "
    f"{IMAGES}, evenly chosen) under 15 corruptions made here at severities {', '.join(map(str, SEVERITIES))}.",
)  # fmt: skip
