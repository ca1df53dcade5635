from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coadvise.loss import Advice, LossWeights, advice_divergence, average_probabilities, co_advise_loss, cross_entropy


@pytest.fixture(scope="module")
def published(reference: Path) -> dict[str, torch.Tensor]:
    return load_file(reference / "loss.safetensors")


def _tokens(published, who):
    return {name: published[f"{who}_{name}"] for name in ("class", "conv", "inv") if f"{who}_{name}" in published}


def test_parts_equal_the_reference(published):
    for name, (t1, t2) in {"conv": (1.0, 2.0), "inv": (1.0, 3.0)}.items():
        student, teacher = published[f"student_{name}"], published[f"teacher_{name}"]
        for tag, temperature in (("t1", t1), ("t2", t2)):
            expected = published[f"kl_{name}_{tag}"].item()
            assert advice_divergence(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-9)
    assert cross_entropy(published["student_class"], published["labels"]).item() == pytest.approx(
        published["ce_hard"].item(), abs=1e-9
    )
    assert cross_entropy(published["student_class"], published["soft_labels"]).item() == pytest.approx(
        published["ce_soft"].item(), abs=1e-9
    )


@pytest.mark.parametrize(
    ("total", "labels", "weights"),
    [
        ("total_hard_t1", "labels", LossWeights(1.0, {"conv": Advice(), "inv": Advice()})),
        ("total_soft_t2_l", "soft_labels", LossWeights(0.5, {"conv": Advice(0.7, 2.0), "inv": Advice(0.9, 3.0)})),
    ],
)
def test_totals_equal_the_reference(published, total, labels, weights):
    losses = co_advise_loss(_tokens(published, "student"), _tokens(published, "teacher"), published[labels], weights)
    assert losses["total"].item() == pytest.approx(published[total].item(), abs=1e-9)


def test_half_precision_logits_are_computed_in_float32():
    student, teacher = torch.randn(16, 10).bfloat16(), torch.randn(16, 10).bfloat16()
    assert advice_divergence(student, teacher, 2.0) == advice_divergence(student.float(), teacher.float(), 2.0)


def test_every_advised_token_gets_a_gradient_and_the_teacher_none():
    tokens = {name: torch.randn(4, 5, requires_grad=True) for name in ("class", "conv", "inv")}
    teachers = {name: torch.randn(4, 5, requires_grad=True) for name in ("conv", "inv")}
    weights = LossWeights(1.0, {"conv": Advice(), "inv": Advice()})
    co_advise_loss(tokens, teachers, torch.tensor([0, 1, 2, 3]), weights)["total"].backward()
    assert all(token.grad is not None and token.grad.abs().sum() > 0 for token in tokens.values())
    assert all(teacher.grad is None for teacher in teachers.values())


def test_no_teacher_leaves_cross_entropy():
    tokens = {name: torch.randn(4, 5) for name in ("class", "conv")}
    labels = torch.tensor([0, 1, 2, 3])
    losses = co_advise_loss(tokens, {}, labels, LossWeights())
    assert set(losses) == {"total", "class"}
    assert losses["total"] == cross_entropy(tokens["class"], labels)


def test_mismatches_are_named():
    tokens = {"class": torch.randn(4, 5), "conv": torch.randn(4, 5)}
    labels = torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="one Advice per teacher"):
        co_advise_loss(tokens, {"conv": torch.randn(4, 5)}, labels, LossWeights())
    with pytest.raises(ValueError, match=r"no student token.*inv"):
        co_advise_loss(tokens, {"inv": torch.randn(4, 5)}, labels, LossWeights(1.0, {"inv": Advice()}))
    with pytest.raises(ValueError, match="same classes"):
        co_advise_loss(tokens, {"conv": torch.randn(4, 6)}, labels, LossWeights(1.0, {"conv": Advice()}))


def test_average_is_a_probability():
    tokens = {"class": torch.randn(4, 5), "conv": torch.randn(4, 5)}
    torch.testing.assert_close(average_probabilities(tokens).sum(-1), torch.ones(4))
