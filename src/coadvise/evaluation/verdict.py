"""The verdict: did advice help, by how much, and with what confidence."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

ByImage = npt.NDArray[Any]  # [N] of the test images
Hits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, as shares (0.01 is one point)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} points (95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f})"


def paired_interval(with_advice: Sequence[ByImage], without: Sequence[ByImage]) -> Interval:
    """Difference of a figure, paired over test images: each image's mean difference over seeds is one observation.

    Args:
        with_advice, without: one [N] array per seed: which images are right, or any figure with one value per image.

    Returns:
        Mean and normal 95 % interval: how much other test images could change the difference between these trained
        networks. `seed_interval`: how much other seeds could.
    """
    difference = np.mean(with_advice, axis=0) - np.mean(without, axis=0)
    half = 1.959964 * difference.std(ddof=1) / math.sqrt(len(difference))
    mean = float(difference.mean())
    return Interval(mean, mean - float(half), mean + float(half))


def seed_interval(differences: Sequence[float]) -> Interval | None:
    """Mean difference over seeds with Student's t interval; None for a single seed."""
    n = len(differences)
    if n < 2:
        return None
    mean = float(np.mean(differences))
    half = float(stdtrit(n - 1, 0.975)) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def direction(intervals: Collection[Interval]) -> int:
    """1 if all intervals are above zero, -1 if all are below, else 0."""
    if intervals and all(interval.low > 0 for interval in intervals):
        return 1
    return -1 if intervals and all(interval.high < 0 for interval in intervals) else 0


def sentence(over_images: Interval, over_repeats: Interval | None, images: int, repeats: str = "seeds") -> str:
    """The verdict in words. "Advice helped" (or hurt) only if every interval excludes zero.

    Args:
        repeats: What the second interval is over.
    """
    intervals = [interval for interval in (over_images, over_repeats) if interval is not None]
    words = {1: "Advice helped", -1: "Advice hurt", 0: "No significant difference"}
    finding = words[direction(intervals)]
    text = f"{finding}: {over_images} over {images} test images"
    return text + (f", {over_repeats} over {repeats}" if over_repeats else "") + "."


def macro_sentence(over_images: Interval, over_seeds: Interval | None) -> str:
    """The same by macro accuracy, for classes of unequal size."""
    text = f"By macro accuracy, where each class counts the same: {over_images} over images"
    return text + (f", {over_seeds} over seeds" if over_seeds else "") + "."


def by_class_size(hits: Hits, labels: npt.NDArray[np.int64]) -> ByImage:
    """Hits [N] weighted so that their mean is the macro accuracy: those of a rare class count more."""
    sizes = np.bincount(labels)
    return hits * (len(labels) / (np.count_nonzero(sizes) * sizes[labels]))


ONE_SEED = (
    "This compares one student of each kind. Use --seeds 3 to see how much other initial weights and views change."
)


def teacher_remark(teachers: Mapping[tuple[str, str], Hits], advised: Mapping[int, Hits]) -> str | None:
    """A sentence on the most accurate teacher, by (name, part), and the students that it advised.

    None if the difference is not significant over the test images and, of several students, over seeds.
    """
    (name, part), hits = max(teachers.items(), key=lambda item: item[1].mean())
    students = [*advised.values()]
    lead, over_seeds = paired_interval(students, [hits]), seed_interval([s.mean() - hits.mean() for s in students])
    away = direction([lead, *([over_seeds] if over_seeds else [])])
    if away == 0:
        return None
    if away > 0:
        return f"The co-advised student is more accurate than its best teacher, the {name}: {lead}."
    than = f"The {name} is more accurate than the co-advised student: {paired_interval([hits], students)}"
    return f"{than}; use it in predict and export with --part {part}."


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; None for a single seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def comparison(
    hits_advised: Mapping[int, ByImage], hits_alone: Mapping[int, ByImage]
) -> tuple[Interval, Interval | None]:
    """The intervals over images and over seeds, for the seeds that both kinds of student have."""
    seeds = sorted(hits_advised.keys() & hits_alone.keys())
    advised, alone = [hits_advised[s] for s in seeds], [hits_alone[s] for s in seeds]
    return paired_interval(advised, alone), seed_interval(
        [float(a.mean() - b.mean()) for a, b in zip(advised, alone, strict=True)]
    )
