"""Who answers like whom: shared mistakes, and how far each token is from each teacher. Pure functions of logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from coadvise.evaluation.scores import log_probabilities

Logits = Mapping[str, Mapping[str, Tensor]]  # [N, K] by part and token, the same images and classes in all
TEACHERS = "teachers/"


@dataclass(frozen=True)
class Divergence:
    """KL(teacher ‖ answer) at temperature 1, in nats, mean over images: Table 5 of the paper."""

    part: str
    answer: str
    teacher: str
    kl: float


@dataclass(frozen=True)
class Agreement:
    """Two answers to the same images, each as (part, answer); all figures are shares of the images.

    Attributes:
        same: both say the same class, right or wrong.
        both_right, only_first, only_second, both_wrong: who is right; together 1.
        same_mistake: both are wrong, and with the same class.
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
        """Images that both get wrong as a share of those that at least one does: 1 where errors are the same."""
        either = 1 - self.both_right
        return self.both_wrong / either if either else 0.0


def divergences(logits: Logits) -> list[Divergence]:
    """From every student's every answer to every teacher of the run."""
    teachers = {part.removeprefix(TEACHERS): tokens for part, tokens in logits.items() if part.startswith(TEACHERS)}
    return [
        Divergence(part, answer, name, float(divergence_by_image(values, teacher["class"]).numpy().mean()))
        for part, tokens in logits.items()
        if not part.startswith(TEACHERS)
        for answer, values in log_probabilities(tokens).items()
        for name, teacher in teachers.items()
    ]


def divergence_by_image(answer: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ answer) of each image at temperature 1, in nats, [N] in float64. Both are logits [N, K]."""
    answer, teacher = answer.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return kl_div(answer, teacher, reduction="none", log_target=True).sum(-1)


def agreements(logits: Logits, labels: Tensor) -> list[Agreement]:
    """Of every two answers of all parts."""
    voices = {
        (part, answer): values.argmax(-1)
        for part, tokens in logits.items()
        for answer, values in log_probabilities(tokens).items()
    }
    return [agreement(a, voices[a], b, voices[b], labels) for a, b in combinations(voices, 2)]


def agreement(first: tuple[str, str], a: Tensor, second: tuple[str, str], b: Tensor, labels: Tensor) -> Agreement:
    """Of two lists of classes [N]."""
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
