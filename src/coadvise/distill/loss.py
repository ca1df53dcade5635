"""The co-advising loss, Eq. (1) of the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coadvise.advice import CLASS, Advice, LossWeights
from coadvise.data.views import Batch


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the batch, in float32 or better.

    Args:
        logits: [B, K].
        labels: [B] class indices, or [B, K] probabilities (mixed or smoothed labels).
        class_weights: [K], how much each class counts; the sum is divided by B, not by the weights in the batch.
    """
    wide = _wide(logits)
    target = labels if labels.ndim == 1 else labels.to(wide.dtype)
    if class_weights is None:
        return F.cross_entropy(wide, target)
    return F.cross_entropy(wide, target, class_weights.to(wide.dtype), reduction="none").mean()


def advice_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² · KL(softmax(teacher/τ) ‖ softmax(student/τ)), summed over classes, averaged over the batch.

    Computed in float32 or better whatever the logits' precision: in bfloat16 its gradient is off by 3-19 %.

    Args:
        student: logits [B, K].
        teacher: logits [B, K]; they get no gradient.
    """
    student_log = F.log_softmax(_wide(student) / temperature, dim=-1)
    teacher_log = F.log_softmax(_wide(teacher).detach() / temperature, dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


def standardised(logits: Tensor) -> Tensor:
    """Logits [B, K] of mean 0 and deviation 1 over the classes, in float32 or better.

    A student that is advised by them learns how a teacher orders the classes and how far apart it sees them, whatever
    the scale of its own logits (Sun et al., "Logit Standardization in Knowledge Distillation", 2024).
    """
    return F.layer_norm(_wide(logits), logits.shape[-1:])


def hard_advice(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy against the teacher's most likely class (Touvron et al. 2021, Eq. 3). Both are logits [B, K]."""
    return cross_entropy(student, teacher.argmax(-1))


def co_advise_loss(
    tokens: Mapping[str, Tensor],
    teacher_logits: Mapping[str, Tensor],
    labels: Tensor,
    weights: LossWeights,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Eq. (1): L = λ_0 · CE(class, y) + Σ_k λ_k · τ_k² · KL(teacher_k ‖ token_k).

    With further `label_tokens` each adds a term λ_0 · CE(token, y) (Table 9, "without distillation").

    Args:
        tokens: the student's logits [B, K] by token name, "class" among them. Other tokens may be without advice.
        teacher_logits: logits [B, K] by teacher.
        labels: [B] class indices or [B, K] probabilities.
        weights: λ and τ; exactly one `Advice` per teacher.
        class_weights: [K], how much each class counts in the cross-entropy. The KL terms are not weighted.

    Returns:
        The "total" with its gradient, and every term by name, detached and before its λ. These are "class", one a
        teacher, the mean over the tokens it advises, and "TOKEN labels" for each further token that learns from the
        labels.

    Raises:
        ValueError: teachers, advice and tokens do not name the same things, or class counts differ.
    """
    if teacher_logits.keys() != weights.advice.keys():
        raise ValueError(
            f"there are logits of the teachers {sorted(teacher_logits)}, but λ and τ for {sorted(weights.advice)}; "
            "give one Advice per teacher"
        )
    if missing := sorted(set(weights.tokens) - tokens.keys()):
        raise ValueError(f"no student token for the teacher(s) or labels {missing}; the student has {sorted(tokens)}")
    class_loss = cross_entropy(tokens[CLASS], labels, class_weights)
    parts = {CLASS: class_loss.detach()}
    total = weights.label * class_loss
    for token in (name for name in weights.label_tokens if name != CLASS):
        term = cross_entropy(tokens[token], labels, class_weights)
        parts[f"{token} labels"] = term.detach()
        total = total + weights.label * term
    if weights.standardise:
        teacher_logits = {name: standardised(logits) for name, logits in teacher_logits.items()}
    for token, names in weights.by_token.items():
        student = standardised(tokens[token]) if weights.standardise else tokens[token]
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
            f"teacher '{name}' has logits of shape {tuple(teacher.shape)}, the student {tuple(student.shape)}: both "
            "must be [batch, classes] with the same classes"
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
    """Mean of all tokens' probabilities [B, K], an alternative to predicting by the class token."""
    return torch.stack([_wide(logits).softmax(-1) for logits in tokens.values()]).mean(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class CoAdvice:
    """The losses of a training step by Eq. (1); without advice, the cross-entropy against the labels."""

    weights: LossWeights
    class_weights: Tensor | None = None

    def __call__(self, student: nn.Module, batch: Batch, advice: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`co_advise_loss` of a batch of images; advice is logits [B, K] by teacher."""
        return co_advise_loss(student(batch.images), advice, batch.labels, self.weights, self.class_weights)
