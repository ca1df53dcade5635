"""Claims judged by figures, and how a table shows them."""

from typing import Any

import numpy as np
import pytest

from coadvise.evaluation.verdict import comparison
from coadvise.studies import Claim, Row, Study
from coadvise.studies.columns import Column
from coadvise.studies.question import gains_more, nearest_pairs, over
from coadvise.studies.result import HELD, NOISE, NOT_HELD, NOT_JUDGED, judged, markdown

RNG = np.random.default_rng(0)
GOOD, POOR = (RNG.random((3, 400)) < share for share in (0.9, 0.6))
X, Y = Column("x", "X", ""), Column("y", "Y", "")


def by_seed(rows: Any) -> dict[int, Any]:
    return dict(enumerate(rows))


def told(rows: dict[str, Any], claim: Claim, **columns: dict[str, Any]) -> dict[str, Any]:
    """What is said of a claim about column x, where the rows have these values by seed."""
    names = {name: Row(name, paper={"x": number} if number < 2 else {}) for number, name in enumerate(rows)}
    study = Study("", "", list(names.values()), [claim], [X, Y])
    return judged(claim, study, {"x": rows, "y": columns.get("y", {name: {} for name in rows})})


def finding(higher: Any, lower: Any, kind: Any = "above") -> dict[str, Any]:
    return told({"a": higher, "b": lower}, Claim("", "1", over("a", "b"), "x", kind))


def test_a_claim_about_images_needs_both_intervals() -> None:
    found = finding(by_seed(GOOD), by_seed(POOR))
    images, seeds = comparison(by_seed(GOOD), by_seed(POOR))
    assert found["finding"] == HELD
    assert found["over"]["images"]["low"] == images.low
    assert seeds is not None
    assert found["over"]["seeds"]["high"] == seeds.high
    assert finding(by_seed(POOR), by_seed(GOOD))["finding"] == NOT_HELD
    one = finding({0: GOOD[0]}, by_seed(POOR))  # the seed that both have
    assert (one["finding"], one["over"]["seeds"]) == (HELD, None)
    assert finding(by_seed(GOOD), {0: POOR[0]})["difference"] == one["difference"]
    wild = [GOOD[0], POOR[1], GOOD[2]]
    assert finding(by_seed(wild), by_seed(POOR))["finding"] == NOISE
    assert finding({}, by_seed(POOR))["finding"] == NOT_JUDGED


@pytest.mark.parametrize(
    ("higher", "above", "similar", "differ"),
    [
        ([0.300, 0.310, 0.290], HELD, NOT_HELD, HELD),
        ([0.010, 0.000, 0.020], NOT_HELD, NOT_HELD, HELD),
        ([0.300, 0.010, 0.100], NOISE, NOISE, NOISE),
        ([0.101, 0.109, 0.091], NOISE, HELD, NOT_HELD),
        ([0.900], NOT_JUDGED, NOT_JUDGED, NOT_JUDGED),
    ],
)
def test_a_claim_about_single_figures_is_judged_over_seeds(
    higher: list[float], above: str, similar: str, differ: str
) -> None:
    lower = {0: 0.1, 1: 0.11, 2: 0.09}
    found = finding(by_seed(higher), lower)
    assert found["over"]["images"] is None
    assert found["difference"] == pytest.approx(np.mean(higher) - 0.1)
    for kind, wanted in (("above", above), ("similar", similar), ("differ", differ)):
        assert finding(by_seed(higher), lower, kind)["finding"] == wanted


def test_gains_are_compared_and_rows_are_chosen_by_figures() -> None:
    rows = {
        name: {0: np.full(10, share) + RNG.normal(0, 1e-3, 10)}
        for name, share in zip("abcd", (0.9, 0.5, 0.7, 0.6), strict=True)
    }
    gain = told(rows, Claim("", "1", gains_more(("a", "b"), ("c", "d")), "x"))
    assert (gain["finding"], gain["difference"]) == (HELD, pytest.approx(0.3, abs=0.01))
    assert gains_more(("a", "b"), ("c", "b")) == {"a": 1, "b": 0, "c": -1}
    chosen = nearest_pairs(["a", "b"], ["c", "d"], "y", most=2)
    assert chosen({"y": {"a": 0.1, "b": 0.5, "c": 0.48, "d": 0.11}}) == {"a": 0.5, "d": -0.5, "b": 0.5, "c": -0.5}
    assert chosen({"y": {"a": 0.1, "b": 0.5, "c": 0.4, "d": 0.11}}) == {}, "two of them are not nearly equal"
    near = told(
        rows,
        Claim("", "1", chosen, "x"),
        y={name: {0: value} for name, value in zip("abcd", (0.1, 0.5, 0.48, 0.11), strict=True)},
    )
    assert near["difference"] == pytest.approx(0.05, abs=0.01)
    assert told(rows, Claim("", "1", chosen, "x"))["finding"] == NOT_JUDGED  # what chooses them was not measured


def test_the_paper_s_own_difference_stands_beside() -> None:
    assert finding({}, {})["paper"] == -1  # row a has 0 there, row b 1
    assert told({name: {} for name in "abc"}, Claim("", "1", over("a", "c"), "x"))["paper"] is None


def test_a_table_shows_units_the_paper_s_figures_and_notes() -> None:
    percent = {"name": "top1", "heading": "top-1", "scale": 100, "digits": 1, "unit": " %", "note": ""}
    nats = {"name": "kl", "heading": "KL", "scale": 1, "digits": 3, "unit": "", "note": "In nats."}
    rows = [
        {
            "name": name,
            "beyond": name != "a",
            "figures": {
                "top1": {
                    "mean": mean,
                    "spread": 0.01,
                    "paper": paper,
                    "printed": "82.0" if paper else "",
                    "seeds": [0, 1],
                },
                "kl": {"mean": 0.25, "spread": None, "paper": None, "printed": "", "seeds": [0]},
            },
        }
        for name, mean, paper in (("a", 0.5, 82.0), ("b", 0.5, None), ("c", None, None))
    ]
    claim = {"text": "a is far", "section": "4", "kind": "above", "column": "kl", "finding": NOISE, "difference": 0.125}
    span = {"mean": 0.02, "low": -0.01, "high": 0.05}
    by_image = {
        **claim,
        "text": "a is good",
        "column": "top1",
        "finding": HELD,
        "over": {"images": span, "seeds": None},
    }
    claims = [{**claim, "over": {"images": None, "seeds": None}, "paper": None}, {**by_image, "paper": 1.5}]
    result = {
        "title": "T", "data": "d", "paper_data": "ImageNet-100", "networks": {"ResNet-18": "conv"}, "notes": ["N."],
        "columns": [percent, nats], "rows": rows, "claims": claims,
    }  # fmt: skip
    lines = list(markdown(result))
    assert "Measured on d, up to 2 seeds a row; the paper's figures are of ImageNet-100." in lines
    assert "In place of the paper's networks: ResNet-18: conv." in lines
    assert "| row | top-1 | paper (ImageNet-100) | KL |" in lines
    assert "| a | 50.0 ± 1.0 % | 82.0 % | 0.250 |" in lines
    below = lines.index("| *beyond the paper:* |  |  |  |")
    assert lines.index("| b | 50.0 ± 1.0 % |  | 0.250 |") == below + 1
    assert "| c | not measured |  | 0.250 |" in lines
    assert {"In nats.", "N."} <= set(lines)
    assert "| a is far | 4 | KL | within noise | - | +0.125 |  |" in lines
    assert "| a is good | 4 | top-1 | held | +2.0 (-1.0 to +5.0) | - | +1.5 |" in lines
