"""What advice gained in our runs of the presets as they are (`results/`), by how many pictures a class they had."""

from collections.abc import Sequence
from typing import NamedTuple

LIKE = 2  # a set is like another that has at most so many times as many pictures a class, and at least that part


class Gain(NamedTuple):
    """Of one run, or of two rows of the study of gains.

    Attributes:
        record: its folder in `results/`.
        pictures: a class, on average.
        points: of top-1, the co-advised student's class token over the student alone.
    """

    record: str
    pictures: int
    points: float


GAINS = (
    Gain("digits", 30, 2.0), Gain("clothing", 128, 9.9), Gain("trashnet", 337, 4.4), Gain("trashnet-128", 337, 4.0),
    Gain("trashnet-128-split1", 337, 4.6), Gain("trashnet-128-split2", 337, 3.8), Gain("cifar10-500", 500, 6.6),
    Gain("cifar10-500-one-seed", 500, 5.5), Gain("cifar10-500-gain", 20, 2.1), Gain("cifar10-500-gain", 50, 3.7),
    Gain("cifar10-500-gain", 100, 4.9),
)  # fmt: skip


def expectation(per_class: Sequence[int]) -> str | None:
    """What to expect of advice with so many training pictures in each class; None where no run of ours was like it."""
    mean = sum(per_class) / len(per_class)
    if not (like := [gain for gain in GAINS if mean / LIKE <= gain.pictures <= mean * LIKE]):
        return None
    low, high = min(gain.points for gain in like), max(gain.points for gain in like)
    gained = f"{low:g} points in one run" if len(like) == 1 else f"{low:g} to {high:g} points in {len(like)} runs"
    return f"with about {float(f'{mean:.2g}'):,.0f} images a class, advice gained {gained} of ours"
