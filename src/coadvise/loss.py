"""The co-advising loss, Eq. (1) of the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

CLASS = "class"  # the name of the class token's answer in every dict of logits
AVERAGE = "average"  # that of all tokens' together, `average_probabilities`


@dataclass(frozen=True)
class Advice:
    """How one teacher advises.

    Attributes:
        weight: λ_k of Eq. (1).
        temperature: τ_k of Eq. (1).
        token: the student's token it advises, "class" among them, or several, each with λ_k and τ_k; "" is the token of
            the teacher's own name.
        hard: cross-entropy against the teacher's most likely class (DeiT's hard distillation) in place of the KL term.
    """

    weight: float = 1.0
    temperature: float = 1.0
    token: str | tuple[str, ...] = ""
    hard: bool = False

    def tokens(self, name: str) -> tuple[str, ...]:
        """The tokens that it is for, coming from the teacher of this name."""
        return (self.token or name,) if isinstance(self.token, str) else self.token


@dataclass(frozen=True)
class LossWeights:
    """λ_0 on the class token's cross-entropy, and how each teacher advises.

    Attributes:
        label: λ_0.
        advice: one `Advice` a teacher, by the teacher's name.
        mean: several teachers on one token advise it by the mean of their probabilities, in place of a term each. The
            gradients of n such terms are n times that of the mean, if λ is the same, so this is a smaller λ.

    Raises:
        ValueError: teachers that advise by their mean differ in temperature, or are hard.
    """

    label: float = 1.0
    advice: Mapping[str, Advice] = field(default_factory=dict)
    mean: bool = False

    def __post_init__(self) -> None:
        for token, names in self.by_token.items() if self.mean else ():
            together = [self.advice[name] for name in names]
            if len(names) > 1 and (len({a.temperature for a in together}) > 1 or any(a.hard for a in together)):
                raise ValueError(
                    f"the teachers {', '.join(names)} advise token '{token}' by their mean, which needs soft advice at "
                    "one temperature; give them the same temperature and hard=false, or let them advise by the sum"
                )

    @property
    def by_token(self) -> dict[str, list[str]]:
        """The teachers of each advised token, in order."""
        teachers: dict[str, list[str]] = {}
        for name, advice in self.advice.items():
            for token in advice.tokens(name):
                teachers.setdefault(token, []).append(name)
        return teachers

    @property
    def trained_tokens(self) -> tuple[str, ...]:
        """The tokens whose answers training shapes: "class", and each that a teacher advises with a λ above 0."""
        return (CLASS, *(token for token in self.by_token if token != CLASS and self._advised(token)))

    def _advised(self, token: str) -> bool:
        return any(self.advice[name].weight > 0 for name in self.by_token.get(token, ()))

    @property
    def trains_class(self) -> bool:
        """Whether anything shapes the class token's answer: labels or a teacher."""
        return self.label > 0 or self._advised(CLASS)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 or better.

    Args:
        logits: [B, K].
        labels: [B] class indices, or [B, K] probabilities (mixed or smoothed labels).
    """
    return F.cross_entropy(_wide(logits), labels if labels.ndim == 1 else labels.to(_wide(logits).dtype))


def advice_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² · KL(softmax(teacher/τ) ‖ softmax(student/τ)), summed over classes, averaged over the batch.

    Computed in float32 or better whatever the logits' precision: in bfloat16 its gradient is off by 3-19 %.

    Args:
        student: logits [B, K].
        teacher: logits [B, K], no gradient taken.
    """
    student_log = F.log_softmax(_wide(student) / temperature, dim=-1)
    teacher_log = F.log_softmax(_wide(teacher).detach() / temperature, dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


def hard_advice(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy against the teacher's most likely class (Touvron et al. 2021, Eq. 3). Both are logits [B, K]."""
    return cross_entropy(student, teacher.argmax(-1))


def co_advise_loss(
    tokens: Mapping[str, Tensor], teacher_logits: Mapping[str, Tensor], labels: Tensor, weights: LossWeights
) -> dict[str, Tensor]:
    """Eq. (1): L = λ_0 · CE(class, y) + Σ_k λ_k · τ_k² · KL(teacher_k ‖ token_k).

    Args:
        tokens: the student's logits [B, K] by token name, "class" among them. Tokens nobody advises are left alone.
        teacher_logits: logits [B, K] by teacher.
        labels: [B] class indices or [B, K] probabilities.
        weights: λ and τ; exactly one `Advice` per teacher.

    Returns:
        "total" with its gradient, and every part by name, detached and before its λ: "class" and one entry per teacher,
        the mean over the tokens it advises.

    Raises:
        ValueError: teachers, advice and tokens do not name the same things, or class counts differ.
    """
    if teacher_logits.keys() != weights.advice.keys():
        raise ValueError(
            f"teachers answered for {sorted(teacher_logits)} but λ and τ are given for {sorted(weights.advice)}; "
            "give one Advice per teacher"
        )
    if missing := sorted(weights.by_token.keys() - tokens.keys()):
        raise ValueError(f"no student token for the teacher(s) {missing}; the student has {sorted(tokens)}")
    class_loss = cross_entropy(tokens[CLASS], labels)
    parts = {CLASS: class_loss.detach()}
    total = weights.label * class_loss
    for token, names in weights.by_token.items():
        student = tokens[token]
        for name in names:
            advice = weights.advice[name]
            term = _advice(student, name, teacher_logits[name], advice)
            parts[name] = parts.get(name, 0) + term.detach() / len(advice.tokens(name))
            if len(names) == 1 or not weights.mean:
                total = total + advice.weight * term
        if len(names) > 1 and weights.mean:
            total = total + _mean_advice(
                student, [teacher_logits[n] for n in names], [weights.advice[n] for n in names]
            )
    return {"total": total, **parts}


def _advice(student: Tensor, name: str, teacher: Tensor, advice: Advice) -> Tensor:
    """One teacher's term, before its λ."""
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher '{name}' answers with {tuple(teacher.shape)} logits, the student with "
            f"{tuple(student.shape)}: both must be [batch, classes] of the same classes"
        )
    return hard_advice(student, teacher) if advice.hard else advice_divergence(student, teacher, advice.temperature)


def _mean_advice(student: Tensor, teachers: Sequence[Tensor], advice: Sequence[Advice]) -> Tensor:
    """mean(λ) · τ² · KL(Σ λ_k softmax(teacher_k/τ) / Σ λ_k ‖ softmax(student/τ))."""
    total, temperature = sum(a.weight for a in advice), advice[0].temperature
    if not total:
        return torch.zeros_like(student[0, 0])
    probabilities = [(_wide(logits).detach() / temperature).softmax(-1) for logits in teachers]
    mean = torch.stack([a.weight / total * p for a, p in zip(advice, probabilities, strict=True)]).sum(0)
    mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)
    return total / len(advice) * advice_divergence(student, mean.log() * temperature, temperature)


def average_probabilities(tokens: Mapping[str, Tensor]) -> Tensor:
    """Mean over all tokens' probabilities [B, K]: the explicit alternative to the class token's answer."""
    return torch.stack([_wide(logits).softmax(-1) for logits in tokens.values()]).mean(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
