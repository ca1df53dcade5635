"""Agreement against counting image by image, divergence against its definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coadvise.evaluation.agreement import agreement, agreements, divergences

ANSWERS = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=30)  # label, one's and other's answer


@given(ANSWERS)
def test_agreement_counts_images(rows: list[tuple[int, int, int]]) -> None:
    labels, one, other = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = agreement(("a", "class"), one, ("b", "class"), other, labels)
    n = len(rows)
    assert found.same == sum(a == b for _, a, b in rows) / n
    assert found.both_right == sum(a == y and b == y for y, a, b in rows) / n
    assert found.only_first == sum(a == y and b != y for y, a, b in rows) / n
    assert found.only_second == sum(a != y and b == y for y, a, b in rows) / n
    assert found.both_wrong == sum(a != y and b != y for y, a, b in rows) / n
    assert found.same_mistake == sum(a == b != y for y, a, b in rows) / n
    either = sum(a != y or b != y for y, a, b in rows)
    both = sum(a != y and b != y for y, a, b in rows)
    assert found.error_overlap == pytest.approx(both / either if either else 0)


def test_every_two_answers_of_all_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (50,), generator=generator)
    logits = {
        "teachers/conv": {"class": torch.randn(50, 4, generator=generator)},
        "students/advised-0": {name: torch.randn(50, 4, generator=generator) for name in ("class", "conv")},
    }
    found = agreements(logits, labels)
    voices = [("teachers/conv", "class"), *(("students/advised-0", a) for a in ("class", "conv", "average"))]
    assert [(pair.first, pair.second) for pair in found] == [
        (a, b) for i, a in enumerate(voices) for b in voices[i + 1 :]
    ]
    average = sum(values.softmax(-1) for values in logits["students/advised-0"].values()).argmax(-1)
    with_average = next(p for p in found if p.first == voices[0] and p.second == voices[3])
    assert with_average.same == (logits["teachers/conv"]["class"].argmax(-1) == average).double().mean().item()


def test_divergence_is_that_of_its_definition_from_teacher_to_answer() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, token, other = (2 * torch.randn(20, 5, generator=generator) for _ in range(3))
    logits = {
        "teachers/conv": {"class": teacher},
        "teachers/inv": {"class": token},
        "students/advised-1": {"class": token, "conv": other},
        "students/alone-1": {"class": teacher},
    }
    found = {(row.part, row.answer, row.teacher): row.kl for row in divergences(logits)}
    answers = ("class", "conv", "average")
    assert list(found) == [
        *(("students/advised-1", answer, name) for answer in answers for name in ("conv", "inv")),
        ("students/alone-1", "class", "conv"),
        ("students/alone-1", "class", "inv"),
    ]
    wanted = 0.0
    for t, s in zip(teacher.double().softmax(-1).tolist(), token.double().softmax(-1).tolist(), strict=True):
        wanted += sum(p * math.log(p / q) for p, q in zip(t, s, strict=True)) / 20
    assert found["students/advised-1", "class", "conv"] == pytest.approx(wanted, rel=1e-6)
    assert found["students/advised-1", "class", "inv"] == pytest.approx(0, abs=1e-6)
    assert found["students/alone-1", "class", "conv"] == pytest.approx(0, abs=1e-6)
    assert found["students/alone-1", "class", "inv"] != pytest.approx(wanted, rel=0.01)  # it is not symmetric
    assert min(found.values()) > -1e-9
