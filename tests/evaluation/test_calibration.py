"""Temperatures: what they were made with is found, and no prediction changes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coadvise.evaluation.calibration import LIMITS, calibrated, calibrated_errors, fit_temperatures
from coadvise.evaluation.scores import correct, log_probabilities, scores


def drawn(images: int, classes: int, seed: int, sharpness: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits [N, K], and labels drawn from their probabilities: calibrated at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(images, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_that_logits_were_multiplied_with_is_found(factor: float) -> None:
    logits, labels = drawn(20_000, 6, seed=0)
    given = {"class": factor * logits}
    found = fit_temperatures(given, labels)
    assert found == {"class": pytest.approx(factor, rel=0.05)}
    after = calibrated_errors(given, labels, found)["class"]
    assert after < 0.015
    assert scores(given, labels)["class"].ece > 0.05 or factor == 1


@given(st.integers(0, 10**6), st.floats(0.2, 6))
def test_no_temperature_near_it_has_a_smaller_log_loss(seed: int, factor: float) -> None:
    """Of each answer by itself, the average of both too, whatever constant the logits have."""
    logits, labels = drawn(60, 4, seed)
    given = {"class": factor * logits + 7, "conv": drawn(60, 4, seed + 1)[0]}
    found = fit_temperatures(given, labels)
    assert list(found) == ["class", "conv", "average"]
    for answer, values in log_probabilities(given).items():
        losses = [
            -calibrated(values.double(), found[answer] * by).gather(1, labels[:, None]).mean().item()
            for by in (1, 0.95, 1.05)
        ]
        inside = LIMITS[0] * 1.06 < found[answer] < LIMITS[1] / 1.06
        assert not inside or found[answer] == 1 or losses[0] == min(losses)


@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0.01, 30), st.floats(*LIMITS))
def test_no_prediction_changes(seed: int, classes: int, sharpness: float, temperature: float) -> None:
    logits, labels = drawn(40, classes, seed, sharpness)
    given = {"class": logits, "conv": logits.flip(0)}
    for answer, hits in correct(given, labels).items():
        after = calibrated(log_probabilities(given)[answer].double(), temperature)
        assert torch.equal(after.argmax(-1), log_probabilities(given)[answer].argmax(-1))
        if answer != "average":  # whose probabilities round otherwise than their logarithms
            assert torch.equal(after.argmax(-1) == labels, hits)
        assert after.exp().sum(-1).tolist() == pytest.approx([1.0] * 40)


def test_where_nothing_is_wrong_or_finite_there_is_nothing_to_fit() -> None:
    labels = torch.arange(3)
    assert fit_temperatures({"class": torch.eye(3)}, labels) == {"class": 1.0}
    assert fit_temperatures({"class": torch.full((3, 3), math.nan)}, labels) == {"class": 1.0}
    always_wrong = fit_temperatures({"class": -torch.eye(3)}, labels)["class"]
    assert always_wrong == pytest.approx(LIMITS[1], rel=1e-3)
