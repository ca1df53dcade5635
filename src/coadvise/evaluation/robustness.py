"""Accuracy under the fifteen corruptions: from ImageNet-C's files, or computed from your own images."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coadvise.config.schema import Fit, ImageSize
from coadvise.data import draws
from coadvise.data.images import Pixels, Values
from coadvise.data.loader import still_batches
from coadvise.data.scan import scan_split
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources import Split
from coadvise.errors import UserError
from coadvise.evaluation.corruptions import CORRUPTIONS, corrupt
from coadvise.evaluation.scores import correct
from coadvise.training.listener import Listener

# AlexNet's error on ImageNet-C, mean over severities, as Hendrycks and Dietterich published it (ICLR 2019, table 1).
ALEXNET_ERRORS = dict(
    zip(
        CORRUPTIONS,
        (0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324, 0.564592,
         0.853204, 0.646056, 0.717840, 0.606500),
        strict=True,
    )
)  # fmt: skip
AT_ONCE = 2048  # images of ImageNet-C decoded and in memory at a time

Answers = Callable[[Iterable[Tensor]], Mapping[str, Mapping[str, Tensor]]]  # batches -> logits [N, K] by part and token


@dataclass(frozen=True)
class Case:
    """Images under one corruption and severity; a large set comes as several cases."""

    name: str
    severity: int
    labels: Tensor
    batches: Iterable[Tensor]


def made_cases(
    split: ScannedSplit,
    numbers: Sequence[int],
    severities: Sequence[int],
    image_size: ImageSize,
    seed: int,
    workers: int,
) -> Iterator[Case]:
    """Every corruption of a split's images.

    Args:
        numbers: one per row of the split. An image's corruption is a function of its number and the seed, so a subset
            of the images gets the same corruptions as the whole set.
    """
    labels = torch.from_numpy(split.labels)
    for name in CORRUPTIONS:
        for severity in severities:
            change = partial(_corrupted, numbers=numbers, name=name, severity=severity, seed=seed)
            yield Case(name, severity, labels, still_batches(split, image_size, workers=workers, change=change))


def _corrupted(pixels: Pixels, row: int, numbers: Sequence[int], name: str, severity: int, seed: int) -> Pixels:
    return corrupt(pixels, name, severity, draws.scalar_seed(seed, draws.CORRUPTION, 0, numbers[row]))


def file_cases(
    splits: Mapping[tuple[str, int], Split],
    image_size: ImageSize,
    unreadable: list[str],
    workers: int,
    fit: Fit = "crop",
    values: Values | None = None,
) -> Iterator[Case]:
    """Corrupted images from files. Each file is read once; unreadable ones are added to `unreadable`."""
    for (name, severity), split in splits.items():
        readable = 0
        for start in range(0, len(split), AT_ONCE):
            few = split.subset(range(start, min(start + AT_ONCE, len(split))))
            scanned = scan_split(few, image_size, True, fit, values)
            unreadable += (f"{name}/{severity}: {line}" for line in scanned.unreadable)
            readable += len(scanned)
            if len(scanned):
                batches = still_batches(scanned, image_size, workers=workers)
                yield Case(name, severity, torch.from_numpy(scanned.labels), batches)
        if not readable:
            raise UserError(f"no image of {name} at severity {severity} can be read; first error: {unreadable[0]}")


def count_cases(splits: Iterable[Split]) -> int:
    """How many cases `file_cases` makes of them, if all files can be read."""
    return sum(-(-len(split) // AT_ONCE) for split in splits)


def corruption_scores(answers: Answers, cases: Iterable[Case], total: int, listener: Listener) -> dict[str, Any]:
    """Top-1 of every output under every corruption, and the mean corruption error.

    Args:
        total: the number of cases, for the progress display.

    Returns:
        {"images": at most, per corruption and severity, "severities", "seconds", "parts": {part: {output: {"top1":
        {name: mean over severities}, "by_severity": {name: {severity: top-1}}, "mean_corruption_error": a share, not
        normalised, as in the Co-advise paper}}}}.
    """
    began = time.monotonic()
    counted: dict[tuple[str, int], int] = defaultdict(int)
    hits: dict[tuple[str, str], dict[tuple[str, int], int]] = defaultdict(lambda: defaultdict(int))
    for done, case in enumerate(cases, 1):
        where = (case.name, case.severity)
        counted[where] += len(case.labels)
        for part, logits in answers(case.batches).items():
            for answer, right in correct(logits, case.labels).items():
                hits[part, answer][where] += int(right.sum())
        listener.progress("corruptions", done, total, {})
    parts: dict[str, dict[str, Any]] = {}
    for (part, answer), right_ones in hits.items():
        rows: dict[str, dict[str, float]] = {name: {} for name in CORRUPTIONS}
        for (name, severity), count in counted.items():
            rows[name][str(severity)] = right_ones[name, severity] / count
        parts.setdefault(part, {})[answer] = _summary(rows)
    severities = sorted({severity for _, severity in counted})
    return {
        "images": max(counted.values()),
        "severities": severities,
        "seconds": round(time.monotonic() - began, 1),
        "parts": parts,
    }


def _summary(by_severity: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    top1 = {name: sum(row.values()) / len(row) for name, row in by_severity.items()}
    return {
        "top1": top1,
        "by_severity": by_severity,
        "mean_corruption_error": 1 - sum(top1.values()) / len(top1),
    }


def relative_to_alexnet(top1: Mapping[str, float]) -> float:
    """The mean corruption error as ImageNet-C's authors define it: the mean of the errors divided by AlexNet's."""
    return sum((1 - value) / ALEXNET_ERRORS[name] for name, value in top1.items()) / len(top1)
