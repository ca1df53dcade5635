"""The predictions of teachers and students, side by side. Arithmetic only, no HTML.

A predictor is a teacher, a student trained alone, or one output (token or average) of a co-advised student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from coadvise.report.read import ADVISED, ALONE, AVERAGE, Floats, Ints, Predictions, Run, group_of, number

TONES = 6  # of the style sheet, for tokens


def tone(run: Run, token: str) -> str:
    """The style class of a token: by its place among the teachers, or fixed for class, total and average."""
    fixed = {"class": "tone-student", "total": "tone-total", AVERAGE: "tone-average"}
    place = run.tokens.index(token) if token in run.tokens else len(run.tokens)
    return fixed.get(token) or f"tone-{place % TONES}"


@dataclass(frozen=True)
class Predictor:
    """A column or row of the page's comparisons.

    Attributes:
        name, short: its name, and a shorter one for narrow columns.
        part, token: the network of the run, and the output of it.
        shape: its marker: "square" for a teacher, "ring" for a student alone, "dot" for a co-advised student.
        tone: its style class.
    """

    name: str
    short: str
    part: str
    token: str
    shape: str
    tone: str

    @property
    def is_teacher(self) -> bool:
        return self.shape == "square"


def group_parts(run: Run, group: str) -> list[str]:
    """The parts of a group that have predictions for the class token, in the order of their seeds."""
    parts = [part for part in run.parts if group_of(part)[0] == group and part in run.predictions]
    return [part for part in parts if "class" in run.predictions[part].predicted]


def teacher_name(run: Run, part: str) -> str:
    """The teacher's name in its result, or one made from its token."""
    given = run.results.get(part, {}).get("name")
    return str(given) if given else f"{part.removeprefix('teachers/')} teacher"


def predictors(run: Run) -> list[Predictor]:
    """The teachers, the first student alone, and each output of the first co-advised student."""
    found = []
    for part in run.parts:
        if part.startswith("teachers/") and group_parts(run, part):
            token = part.removeprefix("teachers/")
            found.append(Predictor(teacher_name(run, part), token, part, "class", "square", tone(run, token)))
    for part in group_parts(run, ALONE)[:1]:
        found.append(Predictor("student alone", "alone", part, "class", "ring", "tone-alone"))
    for part in [part for part in run.parts if group_of(part)[0] == ADVISED and part in run.predictions][:1]:
        for token in run.predictions[part].predicted:
            label = "student, average" if token == AVERAGE else f"student, {token} token"
            found.append(Predictor(label, token, part, token, "dot", tone(run, token)))
    return found


def comparable(run: Run, found: Sequence[Predictor]) -> list[Predictor]:
    """Those with the images and the number of classes of the co-advised student (or, without one, of the first)."""
    if not found:
        return []
    first = run.predictions[next((p for p in found if p.shape == "dot"), found[0]).part]
    pairs = ((predictor, run.predictions[predictor.part]) for predictor in found)
    return [p for p, own in pairs if own.classes == first.classes and np.array_equal(own.labels, first.labels)]


def predicted(run: Run, predictor: Predictor) -> Ints:
    """The predicted classes [N]."""
    return run.predictions[predictor.part].predicted[predictor.token]


def class_accuracy(predictions: Predictions, classes: int) -> Floats:
    """The class token's accuracy on the images of each class [classes]; NaN for a class without images."""
    labels = predictions.labels
    known = (labels >= 0) & (labels < classes)
    right = (predictions.predicted["class"] == labels) & known
    total = np.bincount(labels[known], minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.bincount(labels[right], minlength=classes) / np.where(total > 0, total, np.nan)


def confusion(predictions: Predictions, classes: int) -> Ints:
    """How many images of each class the class token predicts as each [classes, classes], a row a label."""
    labels, said = predictions.labels, predictions.predicted["class"]
    known = (labels >= 0) & (labels < classes) & (said < classes)
    counts = np.bincount(labels[known] * classes + said[known], minlength=classes**2)
    return counts.reshape(classes, classes).astype(np.int64)


def agreement(run: Run, found: Sequence[Predictor]) -> Floats:
    """The share of images for which two predictors choose the same class [P, P]."""
    chosen = [predicted(run, predictor) for predictor in found]
    return np.array([[np.mean(first == second) for second in chosen] for first in chosen])


def disputed(run: Run, teachers: Sequence[Predictor]) -> Ints:
    """The images on which the teachers disagree, the most confident disagreement first.

    A disagreement is as confident as the less confident of its two teachers; ties go to the earlier image.
    """
    if len(teachers) < 2:
        return np.empty(0, np.int64)
    strength = np.zeros(len(predicted(run, teachers[0])))
    for first, second in combinations(teachers, 2):
        confidence = (run.predictions[teacher.part].confidence[teacher.token] for teacher in (first, second))
        differ = predicted(run, first) != predicted(run, second)
        strength = np.maximum(strength, np.where(differ, np.minimum(*confidence), 0.0))
    order = np.argsort(-strength, kind="stable")
    return order[: int(np.count_nonzero(strength))]


def choose_examples(run: Run, teachers: Sequence[Predictor], student: Predictor, most: int = 8) -> list[int]:
    """Disputed images of every case (which teacher is right, is the student right), cases in turn, strongest first."""
    labels = run.predictions[student.part].labels
    cases: dict[tuple[bool, int], list[int]] = {}
    for row in disputed(run, teachers):
        right = next((k for k, t in enumerate(teachers) if predicted(run, t)[row] == labels[row]), len(teachers))
        wrong = bool(predicted(run, student)[row] != labels[row])
        cases.setdefault((wrong, right), []).append(int(row))
    queues = [cases[case] for case in sorted(cases)]
    turns = (queue[turn] for turn in range(most) for queue in queues if turn < len(queue))
    return [row for _, row in zip(range(most), turns, strict=False)]


def wilson_interval(share: float, images: float) -> tuple[float, float]:
    """The 95 % interval of a share measured on so many images (Wilson, 1927)."""
    z = 1.959964
    middle = share + z * z / (2 * images)
    half = z * float(np.sqrt(max(share * (1 - share), 0.0) / images + z * z / (4 * images * images)))
    return (middle - half) / (1 + z * z / images), (middle + half) / (1 + z * z / images)


def score(record: object, token: str = "class") -> float | None:
    """One token's value in a record's `top1`, `top5`, `ece` or `nll`."""
    return number(record.get(token)) if isinstance(record, dict) else None
