"""Eq. (1) against the published code's numbers and against formulas written out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coadvise.advice import Advice, LossWeights
from coadvise.distill.loss import advice_divergence, average_probabilities, co_advise_loss, cross_entropy


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


def test_standardised_advice_is_the_same_for_logits_of_any_scale_and_offset():
    """Written out for one teacher; labels are not touched, nor is what a token says."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, label = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    weights = LossWeights(1.0, {"conv": Advice(2.0, 3.0)}, standardise=True)

    def losses(student, teacher):
        tokens = {"class": label, "conv": student}
        return co_advise_loss(tokens, {"conv": teacher}, torch.arange(8) % 5, weights)

    def z(x):
        return (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)

    found = losses(student, teacher)
    torch.testing.assert_close(found["conv"], advice_divergence(z(student), z(teacher), 3.0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["class"], cross_entropy(label, torch.arange(8) % 5))
    moved = losses(5 * student + 7, teacher / 4 - 1)
    torch.testing.assert_close(moved["total"], found["total"], rtol=1e-3, atol=1e-5)


def test_hard_advice_has_no_logits_to_standardise():
    with pytest.raises(ValueError, match=r"hard.*conv.*standardise"):
        LossWeights(1.0, {"conv": Advice(hard=True)}, standardise=True)


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


def test_hard_advice_is_cross_entropy_against_the_teacher_s_answer():
    tokens, teacher = {name: torch.randn(4, 5) for name in ("class", "conv")}, torch.randn(4, 5)
    losses = co_advise_loss(tokens, {"conv": teacher}, torch.arange(4), LossWeights(1.0, {"conv": Advice(hard=True)}))
    assert losses["conv"] == cross_entropy(tokens["conv"], teacher.argmax(-1))


def _shared(weights: LossWeights, student: torch.Tensor, teachers: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of one token that all teachers advise, without the label's part."""
    student = student.clone().requires_grad_()
    co_advise_loss({"class": student}, teachers, torch.arange(4), weights)["total"].backward()
    assert student.grad is not None
    return student.grad


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_teachers_on_one_token_sum_their_terms_or_advise_by_their_mean(temperature):
    student = torch.randn(4, 5, dtype=torch.float64)
    teachers = {name: 3 * torch.randn(4, 5, dtype=torch.float64) for name in ("a", "b", "c")}
    advice = {name: Advice(1.5, temperature, token="class") for name in teachers}
    summed = _shared(LossWeights(0.0, advice), student, teachers)
    mean = _shared(LossWeights(0.0, advice, mean=True), student, teachers)
    probabilities = torch.stack([(t / temperature).softmax(-1) for t in teachers.values()]).mean(0)
    expected = 1.5 * temperature * ((student / temperature).softmax(-1) - probabilities) / len(student)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(summed, 3 * expected)
    weighted = {**advice, "b": Advice(0.0, temperature, token="class"), "c": Advice(0.0, temperature, token="class")}
    alone = _shared(LossWeights(0.0, {"a": Advice(0.5, temperature, token="class")}), student, {"a": teachers["a"]})
    torch.testing.assert_close(_shared(LossWeights(0.0, weighted, mean=True), student, teachers), alone)


def test_the_mean_of_certain_teachers_is_finite():
    teachers = {"a": torch.tensor([[1e4, 0.0]]), "b": torch.tensor([[1e4, -1e4]])}
    advice = {name: Advice(token="class") for name in teachers}
    tokens = {"class": torch.zeros(1, 2, requires_grad=True)}
    losses = co_advise_loss(tokens, teachers, torch.tensor([0]), LossWeights(1.0, advice, mean=True))
    losses["total"].backward()
    assert torch.isfinite(losses["total"])
    assert torch.isfinite(tokens["class"].grad).all()


@pytest.mark.parametrize("other", [Advice(temperature=2.0, token="class"), Advice(token="class", hard=True)])
def test_a_mean_needs_teachers_of_one_kind(other):
    advice = {"a": Advice(token="class"), "b": other}
    with pytest.raises(ValueError, match="soft advice at one temperature"):
        LossWeights(1.0, advice, mean=True)
    assert LossWeights(1.0, advice).by_token == {"class": ["a", "b"]}
    assert LossWeights(1.0, {"b": other}, mean=True).by_token == {"class": ["b"]}, "alone there is nothing to combine"


def test_tokens_of_teachers_without_weight_are_not_trained():
    weights = LossWeights(0.0, {"a": Advice(0.0), "b": Advice(1.0, token=("b", "class")), "c": Advice(0.0, token="b")})
    assert weights.trained_tokens == ("class", "b")
    assert weights.trains_class
    assert not LossWeights(0.0, {"a": Advice(), "b": Advice(0.0, token="class")}).trains_class
    assert LossWeights(0.1).trains_class


def test_a_teacher_of_several_tokens_advises_each():
    tokens, teachers = ({name: torch.randn(4, 5) for name in names} for names in (("class", "a", "b"), ("a", "b")))
    labels = torch.tensor([0, 1, 2, 3])
    both = {"a": Advice(0.7, 2.0, ("a", "class")), "b": Advice(0.9, 3.0, ("class", "b"))}
    losses = co_advise_loss(tokens, teachers, labels, LossWeights(0.5, both))
    own = co_advise_loss(tokens, teachers, labels, LossWeights(0.5, {"a": Advice(0.7, 2.0), "b": Advice(0.9, 3.0)}))
    on_class = {"a": Advice(0.7, 2.0, "class"), "b": Advice(0.9, 3.0, "class")}
    naive = co_advise_loss(tokens, teachers, labels, LossWeights(0.0, on_class))
    torch.testing.assert_close(losses["total"], own["total"] + naive["total"])
    assert list(losses) == ["total", "class", "a", "b"]
    torch.testing.assert_close(own["a"], advice_divergence(tokens["a"], teachers["a"], 2.0))  # before its λ
    for name in teachers:
        torch.testing.assert_close(losses[name], (own[name] + naive[name]) / 2)
    assert LossWeights(0.5, both).trained_tokens == ("class", "a", "b")


def test_each_token_of_the_labels_has_a_term():
    tokens = {name: torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for name in ("class", "conv", "inv")}
    labels, advice = torch.randint(3, (5,)), {"conv": torch.randn(5, 3, dtype=torch.float64)}
    plain = co_advise_loss(tokens, advice, labels, LossWeights(0.5, {"conv": Advice()}))
    found = co_advise_loss(
        tokens, advice, labels, LossWeights(0.5, {"conv": Advice()}, False, ("class", "conv", "inv"))
    )
    more = cross_entropy(tokens["conv"], labels) + cross_entropy(tokens["inv"], labels)
    torch.testing.assert_close(found["total"], plain["total"] + 0.5 * more)
    assert found.keys() == {"total", "class", "conv", "conv labels", "inv labels"}
    found["total"].backward()
    assert all(logits.grad is not None and logits.grad.abs().sum() > 0 for logits in tokens.values())


@pytest.mark.parametrize("soft", [False, True])
def test_classes_can_count_differently(soft):
    logits, labels, weights = (
        torch.randn(6, 3, dtype=torch.float64),
        torch.randint(3, (6,)),
        torch.tensor((0.5, 1.0, 4.0)),
    )
    target = torch.rand(6, 3, dtype=torch.float64).softmax(-1) if soft else labels
    shares = target if soft else torch.eye(3, dtype=torch.float64)[labels]
    wanted = -(shares * weights * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, target, weights), wanted)
    torch.testing.assert_close(cross_entropy(logits, target, torch.ones(3)), cross_entropy(logits, target))
    tokens = {"class": logits, "conv": logits}
    found = co_advise_loss(tokens, {"conv": logits + 1}, target, LossWeights(1, {"conv": Advice()}), weights)
    torch.testing.assert_close(found["class"], wanted)


def test_average_is_a_probability():
    tokens = {"class": torch.randn(4, 5), "conv": torch.randn(4, 5)}
    found = average_probabilities(tokens)
    torch.testing.assert_close(found.sum(-1), torch.ones(4))
    torch.testing.assert_close(found, (tokens["class"].softmax(-1) + tokens["conv"].softmax(-1)) / 2)
