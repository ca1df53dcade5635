"""Batches do not depend on workers, processes, micro-batches or where a run is resumed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import EVERYTHING, joined, made_views, same

from coadvise.config.schema import AugmentConfig
from coadvise.data.images import fitted, to_array
from coadvise.data.loader import TrainingLoader, epoch_batches, still_batches
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.data.views import Batch, Views
from coadvise.errors import UserError


def batches(loader: TrainingLoader, first: int, last: int) -> list[Batch]:
    """One batch a step, micro-batches joined."""
    return [joined(step) for step in loader.steps(first, last)]


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 7), st.integers(0, 3))
def test_any_step_can_be_the_first(images: int, batch_size: int, first: int, more: int) -> None:
    views = made_views(images, EVERYTHING)
    loader = TrainingLoader(views, batch_size)
    whole = batches(loader, 0, first + more)
    for step, batch in enumerate(whole):  # every position once an epoch, in order
        epoch, place = divmod(step, loader.steps_per_epoch)
        assert same(batch, views[epoch, np.arange(loader.batch_size) + place * loader.batch_size])
    resumed = batches(TrainingLoader(made_views(images, EVERYTHING), batch_size), first, first + more)
    assert all(map(same, resumed, whole[first:]))
    assert len(resumed) == more


@given(st.integers(12, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_micro_batches_and_processes_share_out_the_same_batch(
    images: int, accumulate: int, processes: int, times: int
) -> None:
    size = accumulate * processes * times
    if size > images:
        return
    views = made_views(images, EVERYTHING, size=6)
    whole = batches(TrainingLoader(views, size), 0, 5)
    shares = [
        list(TrainingLoader(views, size, accumulate, rank=rank, processes=processes).steps(0, 5))
        for rank in range(processes)
    ]
    for step, expected in enumerate(whole):
        assert all(len(share[step]) == accumulate for share in shares)
        assert all(len(micro.index) == times for share in shares for micro in share[step])
        parts = [share[step][number] for number in range(accumulate) for share in shares]
        assert same(joined(parts), expected)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 7))
def test_a_whole_epoch_leaves_nothing_out(images: int, batch_size: int, epoch: int) -> None:
    views = made_views(images, EVERYTHING)
    parts = list(epoch_batches(views, epoch, batch_size))
    assert {len(part.index) for part in parts[:-1]} <= {batch_size}
    assert same(joined(parts), views[epoch, np.arange(images)])


@pytest.mark.parametrize(
    ("kind", "presize", "on_device"), [("light", 0, False), ("deit", 0, False), ("deit", 16, False), ("deit", 16, True)]
)
def test_worker_processes_change_nothing(image_folder: Path, kind: str, presize: int, on_device: bool) -> None:
    split = scan(open_source(image_folder), 16, in_memory=kind == "light", presize=presize).train
    augment = AugmentConfig(kind=kind, erase=0.3, mixup=0.8, cutmix=1.0)
    alone, two = (
        list(
            TrainingLoader(
                Views(split, augment, 3, 16, 0, on_device=on_device), 12, accumulate=2, workers=workers
            ).steps(1, 5)
        )
        for workers in (0, 2)
    )
    assert len(alone) == len(two) == 4
    assert all(same(a, b) for ours, theirs in zip(alone, two, strict=True) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("images", "size", "accumulate", "processes", "says"),
    [
        (20, 10, 3, 1, "a batch of 10.*3 micro-batches on 1 process"),
        (20, 10, 2, 4, "multiple of 8"),
        (3, 8, 4, 1, "the 3"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(
    images: int, size: int, accumulate: int, processes: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        TrainingLoader(made_views(images, EVERYTHING), size, accumulate, processes=processes)


def test_a_set_smaller_than_a_batch_is_cut_evenly() -> None:
    loader = TrainingLoader(made_views(11, EVERYTHING), 64, accumulate=2, processes=2)
    assert (loader.batch_size, loader.steps_per_epoch) == (8, 1)


@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), (False, 2)])
def test_scored_images_come_once_in_order(image_folder: Path, in_memory: bool, workers: int) -> None:
    split = scan(open_source(image_folder), 12, in_memory).val
    parts = list(still_batches(split, 12, batch_size=7, workers=workers))
    assert [len(part) for part in parts] == [7, 7, 4]
    expected = np.stack([to_array(fitted(split.picture(row), 12)) for row in range(18)]).astype(np.float32) / 255
    assert np.array_equal(torch.cat(parts).numpy(), expected)
