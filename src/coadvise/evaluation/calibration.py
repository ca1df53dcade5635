"""Temperature scaling: log-probabilities are divided by a temperature before the softmax (Guo et al., ICML 2017).

Each answer of a network has a temperature of its own, "average" too, fitted on images that are neither trained on nor
scored. A logit and its log-probability differ by a constant, so a token's logits are what is divided. Which class is
the most probable never changes.
"""

import math
from collections.abc import Mapping

from scipy.optimize import minimize_scalar
from torch import Tensor

from coadvise.evaluation.scores import calibration_error, log_probabilities

LIMITS = (0.05, 20.0)  # of a temperature


def fit_temperatures(logits: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    """The temperature of each token that minimises the log loss; with several tokens also of "average".

    Args:
        logits: [N, K] by token.
        labels: [N] class indices.
    """
    return {answer: _fit(values, labels) for answer, values in log_probabilities(logits).items()}


def calibrated(log_probabilities: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [N, K] at a temperature."""
    return (log_probabilities / temperature).log_softmax(-1)


def calibrated_errors(
    logits: Mapping[str, Tensor], labels: Tensor, temperatures: Mapping[str, float]
) -> dict[str, float]:
    """The expected calibration error of each answer that has a temperature, at that temperature."""
    return {
        answer: calibration_error(calibrated(values.double(), temperatures[answer]), labels)
        for answer, values in log_probabilities(logits).items()
        if answer in temperatures
    }


def _fit(values: Tensor, labels: Tensor) -> float:
    """1 where every image is right: then the log loss only falls with the temperature, to no minimum."""
    wide = values.double()
    if not wide.isfinite().all() or bool((wide.argmax(-1) == labels).all()):
        return 1.0

    def log_loss(logarithm: float) -> float:
        return -calibrated(wide, math.exp(logarithm)).gather(1, labels[:, None]).mean().item()

    low, high = map(math.log, LIMITS)
    return math.exp(minimize_scalar(log_loss, bounds=(low, high), method="bounded").x)
