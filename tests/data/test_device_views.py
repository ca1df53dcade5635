"""DeiT's views made in batches are the CPU's, whatever batch they come in."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import joined, same

from coadvise.config.reading import load_config
from coadvise.config.schema import AugmentConfig, Fit, ImageSize
from coadvise.data.device_views import Singles, views_place
from coadvise.data.scan import scan
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.errors import UserError
from coadvise.training import engine

PHOTOS = Path(__file__).parents[1] / "photos"
DEIT = AugmentConfig(kind="deit", erase=0.3, mixup=0.8, cutmix=1.0, smoothing=0.1)


@pytest.fixture(scope="module")
def photos() -> ScannedSplit:
    """24 photographs with a shorter side of 64 pixels."""
    return scan(open_source(PHOTOS), 32, in_memory=False, presize=64).train


def both(split: ScannedSplit, augment: AugmentConfig, size: ImageSize) -> tuple[Views, Views]:
    return Views(split, augment, 3, size, 0), Views(split, augment, 3, size, 0, on_device=True)


@pytest.mark.parametrize(
    ("fit", "size", "epochs"), [("crop", 40, 8), ("crop", 16, 3), ("pad", (40, 24), 3), ("stretch", (24, 40), 2)]
)
def test_views_are_those_of_the_cpu(photos: ScannedSplit, fit: Fit, size: ImageSize, epochs: int) -> None:
    """The same regions, operations, arguments, noise and partners; at 16 pixels some regions are resized beforehand."""
    split, equal = replace(photos, fit=fit), list[bool]()
    here, there = both(split, DEIT, size)
    positions, drawn = np.arange(len(split)), Counter[str]()
    for epoch in range(epochs):
        one, other = here[epoch, positions], there[epoch, positions]
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.labels, other.labels)
        difference = (one.images - other.images).abs().flatten(1) * 255
        assert difference.mean(1).max() < 1  # where a rounding comes before equalising or posterising
        equal += (difference.amax(1) < 1e-3).tolist()
        singles = there.gathered((epoch, positions)).singles
        assert isinstance(singles, Singles)
        drawn.update(name for operations in singles.operations for name, _ in operations)
    assert np.mean(equal) > 0.9
    if epochs == 8:
        assert drawn.keys() == there._pipeline.operations, "each operation was compared"
        assert abs(drawn.total() / len(equal) - 1) < 0.15, "two, each with probability 1/2"


@settings(max_examples=4)
@given(epoch=st.integers(0, 1000), data=st.data())
def test_a_view_is_the_same_to_the_bit_in_any_batch(photos: ScannedSplit, epoch: int, data: st.DataObject) -> None:
    _, views = both(photos, DEIT, 32)
    whole = views[epoch, np.arange(24)]
    cuts = sorted(data.draw(st.sets(st.integers(1, 23), max_size=4)))
    _, again = both(photos, DEIT, 32)
    assert same(joined(again[epoch, part] for part in np.split(np.arange(24), cuts)), whole)
    one = data.draw(st.integers(0, 23))
    assert torch.equal(again[epoch, np.array([one])].images[0], whole.images[one])


def test_all_of_a_view_is_made_where_it_is_asked_for(photos: ScannedSplit) -> None:
    """On the meta device, which has shapes only, so any tensor of the CPU's that gets mixed in is an error."""
    views = both(photos, DEIT, 32)[1].on(torch.device("meta"))
    assert views.uses_workers
    batch = views[0, np.arange(24)]
    assert batch.images.device == batch.labels.device == views.device == torch.device("meta")
    assert batch.images.shape == (24, 3, 32, 32)
    assert batch.images.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_makes_the_cpu_s_views(photos: ScannedSplit) -> None:
    here, there = both(photos, DEIT, 48)
    for epoch in range(12):
        one, other = (views[epoch, np.arange(24)] for views in (here, there.on(torch.device("cuda"))))
        assert ((one.images - other.images.cpu()).abs().flatten(1).amax(1) < 1e-5).float().mean() > 0.9


def test_what_goes_over_is_bytes_and_at_most_twice_as_large_as_views(photos: ScannedSplit) -> None:
    singles = both(photos, DEIT, 16)[1].gathered((0, np.arange(24))).singles
    assert isinstance(singles, Singles)
    assert singles.pixels.dtype == torch.uint8
    assert max(singles.pixels.shape[1:3]) <= 32
    assert min(singles.pixels.shape[1:3]) > 16


def test_only_presized_deit_views_are_made_apart(photos: ScannedSplit) -> None:
    assert not Views(replace(photos, presized=None), DEIT, 3, 32, 0, on_device=True).made_apart
    assert not Views(photos, AugmentConfig(kind="none"), 3, 32, 0, on_device=True).made_apart
    assert not both(photos, DEIT, 32)[0].made_apart


@pytest.mark.parametrize(("where", "cuda", "more", "place"), [
    ("auto", True, [], "device"),
    ("auto", False, [], "cpu"),
    ("cpu", True, [], "cpu"),
    ("device", False, [], "device"),
    ("auto", True, ["data.presize=0"], "cpu"),
    ("auto", True, ["augment.rand_augment=augmix-m3"], "cpu"),
    ("auto", True, ["teachers.conv.augment.rand_augment=3a"], "cpu"),
])  # fmt: skip
def test_where_views_are_made(where: str, cuda: bool, more: list[str], place: str) -> None:
    config = load_config("photos", [f"data.views={where}", *more])
    assert views_place(config, cuda) == place


def test_operations_that_a_device_does_not_know_are_named() -> None:
    config = load_config("photos", ["data.views=device", "augment.rand_augment=rand-t3a"])
    with pytest.raises(UserError, match=r"does not know desaturate, gaussian_blur of .*=rand-t3a; use data\.views=cpu"):
        views_place(config, cuda=True)


def test_a_run_records_where_its_views_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU as before there was a choice, so that earlier runs go on and are found."""
    config = load_config("photos")
    assert config.data.views == "auto"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "views" not in engine.resolve_auto(config).model_dump()["data"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(engine, "_cuda_has_bfloat16", lambda: True)
    assert engine.resolve_auto(config).model_dump()["data"]["views"] == "device"
