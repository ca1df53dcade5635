"""The table of networks: the paper's sizes are met or explained, and docs/MODELS.md says what is so."""

from pathlib import Path

import pytest
import timm
import torch
from benchmarks.networks import ENTRIES, Entry, Row, count, default_setting, document, images_per_second, measure
from benchmarks.table import Setting
from torch.utils.flop_counter import FlopCounterMode

from coadvise.models import MODELS
from coadvise.ops import Involution2d

DOCUMENT = Path(__file__).parents[2] / "docs" / "MODELS.md"
BY_NAME = {entry.name: entry for entry in ENTRIES}
OWN = [entry for entry in ENTRIES if entry.model in MODELS and entry.model not in ("rednet101", "rednet152")]


def documented() -> dict[str, list[str]]:
    """The rows of docs/MODELS.md by the network's name."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[1]: row for row in rows}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_paper_s_sizes_are_met_or_explained(entry: Entry) -> None:
    model = entry.create_on_meta()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    difference = entry.difference(millions)
    assert difference
    assert (difference == entry.reason) == bool(entry.reason)  # no excuse that is not needed
    row = documented()[entry.name]
    assert row[3:6] == [f"{millions:.3f}", entry.paper or "–", difference]
    if entry.paper and not entry.reason:
        assert abs(millions - float(entry.paper)) < 1.0


def test_what_a_difference_is_called() -> None:
    entry = Entry("role", "name", "resnet18", paper="25.6", reason="because")
    assert [entry.difference(m) for m in (25.55, 25.64, 25.68, 25.7)] == [
        "rounds to it", "rounds to it", "cut there, not rounded", "because"
    ]  # fmt: skip
    assert Entry("role", "name", "resnet18").difference(1.0) == "not given"


@pytest.mark.parametrize("entry", OWN, ids=lambda entry: entry.name)
def test_the_document_has_what_is_counted(entry: Entry) -> None:
    parameters, macs = count(entry)
    row = documented()[entry.name]
    assert (row[0], row[3], row[6]) == (entry.role, f"{parameters / 1e6:.3f}", f"{macs / 1e9:.3f}")
    assert entry.model in row[2]


def test_the_document_has_every_network_and_says_where_it_was_timed() -> None:
    rows = documented()
    assert list(rows) == [entry.name for entry in ENTRIES]
    assert all(float(row[7]) > 0 for row in rows.values())
    assert "coadvise models --table > docs/MODELS.md" in DOCUMENT.read_text()
    assert "torch 2." in DOCUMENT.read_text()


@pytest.mark.parametrize(("name", "published"), [("RedNet-26", 1.73), ("RedNet-50", 2.71), ("RedNet-101", 4.74)])
def test_rednets_cost_what_their_authors_say_less_what_is_no_product(name: str, published: float) -> None:
    _, macs = count(BY_NAME[name])
    assert 0.97 * published < macs / 1e9 < published


@pytest.mark.parametrize(("name", "published"), [("ResNet-50", 4.09), ("RegNetY-600MF", 0.6), ("DeiT-S", 4.6)])
def test_known_costs(name: str, published: float) -> None:
    assert count(BY_NAME[name])[1] / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("stride", [1, 2])
def test_an_involution_counts_each_neighbour_once_forward_and_twice_backward(stride: int) -> None:
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        Involution2d(16, 3, stride)(x).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    forward = 2 * 9 * 2 * 16 * (8 // stride) ** 2
    assert counts[torch.ops.coadvise.involution2d] == forward
    assert counts[torch.ops.coadvise.involution2d_backward] == 2 * forward


def test_a_measured_row_becomes_a_line() -> None:
    setting = Setting(torch.device("cpu"), batch_size=1, repeats=1)
    (row,) = measure(setting, [BY_NAME["Mixer-Ti, one output"]])
    assert row.images_per_second > 0
    assert images_per_second(row.entry, setting) > 0
    lines = list(document([Row(row.entry, 4_355_800, 809_430_528, 12.345)], setting))
    assert (
        "| student of other bias | Mixer-Ti, one output | `mixer_tiny_coadvised, token_names=[]` | 4.356 | – "
        "| not given | 0.809 | 12.3 |"
    ) in lines
    assert default_setting().device.type in ("cpu", "cuda")


def test_every_network_can_be_named_by_timm() -> None:
    assert all(timm.is_model(entry.model) for entry in ENTRIES)
