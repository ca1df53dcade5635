"""docs/MODELS.md has the current figures, and its sizes are the paper's or explained."""

from pathlib import Path

import pytest
import torch
from benchmarks.networks import ENTRIES, count, line
from torch.utils.flop_counter import FlopCounterMode

from coadvise.models import MODELS
from coadvise.ops import Involution2d

BY_NAME = {entry.name: entry for entry in ENTRIES}


def test_the_document_is_up_to_date_and_every_difference_is_explained() -> None:
    text = (Path(__file__).parents[2] / "docs" / "MODELS.md").read_text()
    lines = [row for row in text.splitlines() if row.startswith("|")][2:]
    for entry, shown in zip(ENTRIES, lines, strict=True):
        if entry.model in {*MODELS} - {"rednet101", "rednet152"}:  # these two are slow, and timm's do not change
            assert shown == line(entry)
        _, _, name, _, millions, paper, difference, _, _ = (cell.strip() for cell in shown.split("|"))
        assert name == entry.name
        assert difference
        assert (difference == entry.reason) == bool(entry.reason)  # no unneeded reason
        if entry.paper and not entry.reason:
            assert abs(float(millions) - float(paper)) < 1.0


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("RedNet-26", 0.97 * 1.73, 1.73),  # RedNet's authors count more than products
        ("RedNet-50", 0.97 * 2.71, 2.71),
        ("ResNet-50", 4.05, 4.13),
        ("RegNetY-600M", 0.594, 0.606),
        ("DeiT-S", 4.55, 4.65),
    ],
)
def test_published_costs(name: str, low: float, high: float) -> None:
    assert low < count(BY_NAME[name])[1] / 1e9 < high


@pytest.mark.parametrize("stride", [1, 2])
def test_an_involution_counts_each_neighbour_once_forward_and_twice_backward(stride: int) -> None:
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        Involution2d(16, 3, stride)(x).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    forward = 2 * 9 * 2 * 16 * (8 // stride) ** 2
    assert counts[torch.ops.coadvise.involution2d] == forward
    assert counts[torch.ops.coadvise.involution2d_backward] == 2 * forward
