"""Who answers what: accuracies, agreements, and the images on which teachers disagree. Arithmetic only, no HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from coadvise.report.read import ADVISED, ALONE, AVERAGE, Floats, Ints, Predictions, Run, group_of, number


def tone(run: Run, token: str) -> str:
    """The tone of a token: its place among the teachers, or a fixed one for class, total and average."""
    fixed = {"class": "tone-student", "total": "tone-total", AVERAGE: "tone-average"}
    place = run.tokens.index(token) if token in run.tokens else len(run.tokens)
    return fixed.get(token) or f"tone-{place % 6}"


@dataclass(frozen=True)
class Voice:
    """One that answers: a teacher, a student alone, or one token of a co-advised student."""

    name: str
    short: str
    part: str
    token: str
    shape: str
    tone: str

    @property
    def teaches(self) -> bool:
        """Whether this is a teacher."""
        return self.shape == "square"


def members(run: Run, group: str) -> list[str]:
    """The parts of a group that have predictions, in the order of their seeds."""
    return [part for part in run.parts if group_of(part)[0] == group and part in run.predictions]


def teacher_name(run: Run, part: str) -> str:
    """The name that the result gives a teacher, or one made of its token."""
    given = run.results.get(part, {}).get("name")
    return str(given) if given else f"{part.removeprefix('teachers/')} teacher"


def voices(run: Run) -> list[Voice]:
    """Everyone whose predictions are there: teachers, the first student alone, the first co-advised one's tokens."""
    found = []
    for part in run.parts:
        if part.startswith("teachers/") and part in run.predictions and "class" in run.predictions[part].answers:
            token = part.removeprefix("teachers/")
            found.append(Voice(teacher_name(run, part), token, part, "class", "square", tone(run, token)))
    for part in members(run, ALONE)[:1]:
        if "class" in run.predictions[part].answers:
            found.append(Voice("student alone", "alone", part, "class", "ring", "tone-alone"))
    for part in members(run, ADVISED)[:1]:
        for token in run.predictions[part].answers:
            label = "student, average" if token == AVERAGE else f"student, {token} token"
            found.append(Voice(label, token, part, token, "dot", tone(run, token)))
    return found


def comparable(run: Run, found: Sequence[Voice]) -> list[Voice]:
    """Those that answered the same images, among as many classes, as the co-advised student (or as the first)."""
    if not found:
        return []
    first = run.predictions[next((v for v in found if v.shape == "dot"), found[0]).part]
    pairs = ((voice, run.predictions[voice.part]) for voice in found)
    return [v for v, p in pairs if p.classes == first.classes and np.array_equal(p.labels, first.labels)]


def answers(run: Run, voice: Voice) -> Ints:
    """A voice's answers [N]."""
    return run.predictions[voice.part].answers[voice.token]


def per_class(predictions: Predictions, token: str, classes: int) -> Floats:
    """The accuracy on each class's images [classes]; NaN for a class without images."""
    labels = predictions.labels
    known = (labels >= 0) & (labels < classes)
    right = (predictions.answers[token] == labels) & known
    total = np.bincount(labels[known], minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.bincount(labels[right], minlength=classes) / np.where(total > 0, total, np.nan)


def group_per_class(run: Run, group: str, classes: int) -> Floats | None:
    """The class token's accuracy per class, the mean over a group's seeds; None without predictions."""
    rows = [
        per_class(run.predictions[part], "class", classes)
        for part in members(run, group)
        if "class" in run.predictions[part].answers
    ]
    return np.mean(rows, axis=0) if rows else None


def agreement(run: Run, found: Sequence[Voice]) -> Floats:
    """The share of images on which two voices give the same answer [V, V]."""
    given = [answers(run, voice) for voice in found]
    return np.array([[np.mean(first == second) for second in given] for first in given])


def disputed(run: Run, teachers: Sequence[Voice]) -> Ints:
    """The images on which not all teachers give the same answer, the strongest dispute first.

    A dispute is as strong as the less confident of the two teachers in it; ties go to the earlier image.
    """
    if len(teachers) < 2:
        return np.empty(0, np.int64)
    strength = np.zeros(len(answers(run, teachers[0])))
    for first, second in combinations(teachers, 2):
        sure = np.minimum(
            run.predictions[first.part].confidence[first.token], run.predictions[second.part].confidence[second.token]
        )
        strength = np.maximum(strength, np.where(answers(run, first) != answers(run, second), sure, 0.0))
    order = np.argsort(-strength, kind="stable")
    return order[: int(np.count_nonzero(strength))]


def choose(run: Run, teachers: Sequence[Voice], student: Voice, most: int = 8) -> list[int]:
    """Images that show the mix: in turn from each case (which teacher is right, is the student), strongest first."""
    labels = run.predictions[student.part].labels
    cases: dict[tuple[bool, int], list[int]] = {}
    for row in disputed(run, teachers):
        right = next((k for k, t in enumerate(teachers) if answers(run, t)[row] == labels[row]), len(teachers))
        wrong = bool(answers(run, student)[row] != labels[row])
        cases.setdefault((wrong, right), []).append(int(row))
    queues = [cases[case] for case in sorted(cases)]
    turns = (queue[turn] for turn in range(most) for queue in queues if turn < len(queue))
    return [row for _, row in zip(range(most), turns, strict=False)]


def interval(share: float, images: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen on so many images."""
    z = 1.959964
    middle = share + z * z / (2 * images)
    half = z * float(np.sqrt(max(share * (1 - share), 0.0) / images + z * z / (4 * images * images)))
    return (middle - half) / (1 + z * z / images), (middle + half) / (1 + z * z / images)


def score(record: object, token: str = "class") -> float | None:
    """The top-1 of one token in an eval's or a result's `top1`."""
    return number(record.get(token)) if isinstance(record, dict) else None
