"""Agreement between networks, and the distance of each student output from each teacher. Pure functions of logits.

An output is what one token predicts ("class", "conv", ...) or the average of all tokens. Records call it `answer`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from coadvise.evaluation.scores import log_probabilities

Logits = Mapping[str, Mapping[str, Tensor]]  # [N, K] by part and token; all for the same images and classes
TEACHERS = "teachers/"


@dataclass(frozen=True)
class Divergence:
    """KL(teacher ‖ output) at temperature 1, in nats, mean over images (Table 5 of the paper)."""

    part: str
    answer: str
    teacher: str
    kl: float


@dataclass(frozen=True)
class Agreement:
    """Two outputs for the same images, each as (part, output). All figures are shares of the images.

    Attributes:
        same: both predict the same class, right or wrong.
        both_right, only_first, only_second, both_wrong: which of them is right; they sum to 1.
        same_mistake: both predict the same wrong class.
    """

    first: tuple[str, str]
    second: tuple[str, str]
    same: float
    both_right: float
    only_first: float
    only_second: float
    both_wrong: float
    same_mistake: float

    @property
    def error_overlap(self) -> float:
        """Images that both get wrong, as a share of those that at least one gets wrong; 0 without errors."""
        either = 1 - self.both_right
        return self.both_wrong / either if either else 0.0


def divergences(logits: Logits) -> list[Divergence]:
    """The distances of every student output from every teacher of the run."""
    teachers = {part.removeprefix(TEACHERS): tokens for part, tokens in logits.items() if part.startswith(TEACHERS)}
    return [
        Divergence(part, output, name, float(divergence_by_image(values, teacher["class"]).numpy().mean()))
        for part, tokens in logits.items()
        if not part.startswith(TEACHERS)
        for output, values in log_probabilities(tokens).items()
        for name, teacher in teachers.items()
    ]


def divergence_by_image(output: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ output) of each image at temperature 1, in nats, [N] float64. Both arguments are logits [N, K]."""
    output, teacher = output.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return kl_div(output, teacher, reduction="none", log_target=True).sum(-1)


def agreements(logits: Logits, labels: Tensor) -> list[Agreement]:
    """The agreement of every two outputs of all parts."""
    predictions = {
        (part, output): values.argmax(-1)
        for part, tokens in logits.items()
        for output, values in log_probabilities(tokens).items()
    }
    return [agreement(a, predictions[a], b, predictions[b], labels) for a, b in combinations(predictions, 2)]


def agreement(first: tuple[str, str], a: Tensor, second: tuple[str, str], b: Tensor, labels: Tensor) -> Agreement:
    """The agreement of the outputs `first` and `second`, which predict the classes `a` and `b` [N]."""
    right_a, right_b, same = a == labels, b == labels, a == b

    def share(which: Tensor) -> float:
        return torch.count_nonzero(which).item() / len(labels)

    return Agreement(
        first,
        second,
        same=share(same),
        both_right=share(right_a & right_b),
        only_first=share(right_a & ~right_b),
        only_second=share(~right_a & right_b),
        both_wrong=share(~right_a & ~right_b),
        same_mistake=share(same & ~right_a),
    )
