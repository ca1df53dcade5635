"""The intervals against bootstrap and scipy, and the sentence against their signs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coadvise.evaluation.verdict import (
    Interval,
    comparison,
    paired_interval,
    seed_interval,
    sentence,
    spread,
    teacher_remark,
)


def answers(
    rng: np.random.Generator, images: int, seeds: int, gain: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Hits with and without advice, the same gain for easy and hard images."""
    ease = rng.beta(2, 1, images)
    return (
        [rng.random(images) < np.clip(ease + gain, 0, 1) for _ in range(seeds)],
        [rng.random(images) < ease for _ in range(seeds)],
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_paired_interval_against_the_bootstrap(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    advised, alone = answers(rng, 800, seeds, 0.04)
    interval = paired_interval(advised, alone)
    difference = np.mean(advised, axis=0) - np.mean(alone, axis=0)
    resampled = difference[rng.integers(0, 800, (4000, 800))].mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    wanted = stats.norm.interval(0.95, difference.mean(), stats.sem(difference))
    assert (interval.low, interval.high) == pytest.approx(wanted, rel=1e-6)
    width = high - low
    assert interval.mean == pytest.approx(np.mean([a.mean() for a in advised]) - np.mean([a.mean() for a in alone]))
    assert interval.low == pytest.approx(low, abs=0.06 * width)
    assert interval.high == pytest.approx(high, abs=0.06 * width)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_seed_interval_is_students(differences: list[float]) -> None:
    interval = seed_interval(differences)
    assert interval is not None
    assert interval.mean == pytest.approx(np.mean(differences))
    error = stats.sem(differences)
    if error > 1e-12:
        low, high = stats.t.interval(0.95, len(differences) - 1, loc=np.mean(differences), scale=error)
        assert (interval.low, interval.high) == pytest.approx((low, high))


def test_one_seed_has_no_interval_over_seeds() -> None:
    assert seed_interval([0.1]) is None
    assert spread([0.1]) is None
    assert spread([0.1, 0.3]) == pytest.approx(np.std([0.1, 0.3], ddof=1))


UP, DOWN, WIDE = Interval(0.02, 0.01, 0.03), Interval(-0.02, -0.03, -0.01), Interval(0.0, -0.01, 0.01)
TOUCHING = Interval(0.01, 0.0, 0.02)


@pytest.mark.parametrize(
    ("over_images", "over_seeds", "finding"),
    [
        *((UP, b, "Advice helped") for b in (None, UP)),
        *((DOWN, b, "Advice hurt") for b in (None, DOWN)),
        *((a, b, "No significant difference") for a, b in [
            (WIDE, None), (TOUCHING, None), (UP, WIDE), (WIDE, UP), (UP, DOWN), (DOWN, WIDE), (WIDE, DOWN),
        ]),
    ],
)  # fmt: skip
def test_the_sentence_says_what_every_interval_says(
    over_images: Interval, over_seeds: Interval | None, finding: str
) -> None:
    text = sentence(over_images, over_seeds, 1497)
    assert text.startswith(f"{finding}: {over_images} over 1497 test images")
    assert text.endswith(f"{over_seeds} over seeds." if over_seeds else "test images.")


def test_comparison_pairs_the_seeds_both_have() -> None:
    rng = np.random.default_rng(0)
    hits = {seed: rng.random(50) < 0.6 for seed in range(5)}
    advised, alone = {2: hits[0], 0: hits[1], 7: hits[2]}, {0: hits[3], 2: hits[4], 5: hits[2]}
    over_images, over_seeds = comparison(advised, alone)
    assert over_images == paired_interval([hits[1], hits[0]], [hits[3], hits[4]])
    assert over_seeds == seed_interval([hits[1].mean() - hits[3].mean(), hits[0].mean() - hits[4].mean()])
    assert comparison({0: hits[0]}, {0: hits[1]})[1] is None


def test_the_best_teacher_is_named_if_it_differs_significantly_from_the_students() -> None:
    right = np.arange(400) % 100
    students = {0: right < 61, 1: right < 62}
    conv, inv = ("conv teacher", "teachers/conv"), ("involution teacher", "teachers/inv")
    said = teacher_remark({conv: right < 70, inv: right < 75}, students) or ""
    assert [text in said for text in ("involution teacher", "+13.5 points", "--part teachers/inv")] == [True] * 3
    assert teacher_remark({conv: right < 50, inv: right < 62}, students) is None, "as good"
    assert teacher_remark({conv: np.roll(right, 7) < 63}, students) is None, "within chance"
    apart = {0: right < 52, 1: right < 75}
    assert teacher_remark({conv: right < 60}, apart) is None, "two students differ too much"
    said = teacher_remark({conv: right < 50, inv: right < 40}, students) or ""
    assert said.startswith("The co-advised student is more accurate than its best teacher, the conv teacher: +11.5")
