"""The co-advising loss, Eq. (1) of the paper."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

CLASS = "class"  # the name of the class token's answer in every dict of logits


@dataclass(frozen=True)
class Advice:
    """How one teacher advises: λ_k (`weight`) and τ_k (`temperature`) of Eq. (1)."""

    weight: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class LossWeights:
    """λ_0 on the class token and one `Advice` per teacher, keyed by the token it advises."""

    label: float = 1.0
    advice: Mapping[str, Advice] = field(default_factory=dict)


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


def co_advise_loss(
    tokens: Mapping[str, Tensor], teacher_logits: Mapping[str, Tensor], labels: Tensor, weights: LossWeights
) -> dict[str, Tensor]:
    """Eq. (1): L = λ_0 · CE(class, y) + Σ_k λ_k · τ_k² · KL(teacher_k ‖ token_k).

    Args:
        tokens: the student's logits [B, K] by token name, "class" among them. Tokens nobody advises are left alone.
        teacher_logits: logits [B, K] by the token each teacher advises.
        labels: [B] class indices or [B, K] probabilities.
        weights: λ and τ; exactly one `Advice` per teacher.

    Returns:
        "total" with its gradient, and every part by name, detached and before its λ: "class" and one entry per teacher.

    Raises:
        ValueError: teachers, advice and tokens do not name the same things, or class counts differ.
    """
    if teacher_logits.keys() != weights.advice.keys():
        raise ValueError(
            f"teachers answered for {sorted(teacher_logits)} but λ and τ are given for {sorted(weights.advice)}; "
            "give one Advice per teacher"
        )
    if missing := sorted(teacher_logits.keys() - tokens.keys()):
        raise ValueError(f"no student token for the teacher(s) {missing}; the student has {sorted(tokens)}")
    class_loss = cross_entropy(tokens[CLASS], labels)
    parts = {CLASS: class_loss.detach()}
    total = weights.label * class_loss
    for name, logits in teacher_logits.items():
        if logits.shape != tokens[name].shape:
            raise ValueError(
                f"teacher '{name}' answers with {tuple(logits.shape)} logits, the student with "
                f"{tuple(tokens[name].shape)}: both must be [batch, classes] of the same classes"
            )
        advice = weights.advice[name]
        divergence = advice_divergence(tokens[name], logits, advice.temperature)
        parts[name] = divergence.detach()
        total = total + advice.weight * divergence
    return {"total": total, **parts}


def average_probabilities(tokens: Mapping[str, Tensor]) -> Tensor:
    """Mean over all tokens' probabilities [B, K]: the explicit alternative to the class token's answer."""
    return torch.stack([_wide(logits).softmax(-1) for logits in tokens.values()]).mean(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
