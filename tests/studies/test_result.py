"""Claims judged by figures, and how a table shows them."""

from typing import Any

import numpy as np
import pytest

from coadvise.evaluation.verdict import comparison
from coadvise.studies import Order
from coadvise.studies.result import HELD, NOISE, NOT_HELD, _compared, markdown

ORDER = Order("a", "b", "x")
RNG = np.random.default_rng(0)
GOOD, POOR = (RNG.random((3, 400)) < share for share in (0.9, 0.6))


def by_seed(rows: Any) -> dict[int, Any]:
    return dict(enumerate(rows))


def test_a_claim_about_images_needs_both_intervals() -> None:
    found = _compared(ORDER, {"a": by_seed(GOOD), "b": by_seed(POOR)})
    images, seeds = comparison(by_seed(GOOD), by_seed(POOR))
    assert found["finding"] == HELD
    assert found["over"]["images"]["low"] == images.low
    assert seeds is not None
    assert found["over"]["seeds"]["high"] == seeds.high
    assert _compared(ORDER, {"a": by_seed(POOR), "b": by_seed(GOOD)})["finding"] == NOT_HELD
    one = _compared(ORDER, {"a": {0: GOOD[0]}, "b": by_seed(POOR)})  # the seed that both have
    assert (one["finding"], one["over"]["seeds"]) == (HELD, None)
    assert _compared(ORDER, {"a": by_seed(GOOD), "b": {0: POOR[0]}})["difference"] == one["difference"]
    wild = [GOOD[0], POOR[1], GOOD[2]]
    assert _compared(ORDER, {"a": by_seed(wild), "b": by_seed(POOR)})["finding"] == NOISE


@pytest.mark.parametrize(
    ("higher", "finding"),
    [([3.0, 3.1, 2.9], HELD), ([0.1, 0.0, 0.2], NOT_HELD), ([3.0, 0.1, 1.0], NOISE), ([9.0], NOISE)],
)
def test_a_claim_about_single_figures_is_judged_over_seeds(higher: list[float], finding: str) -> None:
    found = _compared(ORDER, {"a": by_seed(higher), "b": {0: 1.0, 1: 1.1, 2: 0.9}})
    assert (found["finding"], found["over"]["images"]) == (finding, None)
    assert found["difference"] == pytest.approx(np.mean(higher) - 1)


def test_a_table_shows_units_the_paper_s_figures_and_notes() -> None:
    percent = {"name": "top1", "heading": "top-1", "scale": 100, "digits": 1, "unit": " %", "note": ""}
    nats = {"name": "kl", "heading": "KL", "scale": 1, "digits": 3, "unit": "", "note": "In nats."}
    rows = [
        {
            "name": name,
            "figures": {
                "top1": {"mean": 0.5, "spread": 0.01, "paper": paper},
                "kl": {"mean": 0.25, "spread": None, "paper": None},
            },
        }
        for name, paper in (("a", "82.0"), ("b", None))
    ]
    order = {"higher": "a", "lower": "b", "column": "kl", "finding": NOISE, "difference": 0.125}
    span = {"mean": 0.02, "low": -0.01, "high": 0.05}
    by_image = {**order, "column": "top1", "finding": HELD, "over": {"images": span, "seeds": None}}
    orders = [{**order, "over": {"images": None, "seeds": None}}, by_image]
    result = {"title": "T", "columns": [percent, nats], "rows": rows, "orders": orders}
    lines = list(markdown(result))
    assert "| row | top-1 | the paper, ImageNet-1k | KL |" in lines
    assert "| a | 50.0 ± 1.0 % | 82.0 % | 0.250 |" in lines
    assert "| b | 50.0 ± 1.0 % | - | 0.250 |" in lines
    assert "In nats." in lines
    assert "| KL: a > b | within noise | - | +0.125, one seed |" in lines
    assert "| top-1: a > b | held | +2.0 (-1.0 to +5.0) | - |" in lines
