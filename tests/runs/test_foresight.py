from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytest

from coadvise.config import AugmentConfig, load_config
from coadvise.data.scan import ScannedSplit, scan
from coadvise.data.sources import source_of
from coadvise.data.views import Views
from coadvise.models.network import Network
from coadvise.models.pretrained import given_network
from coadvise.runs import foresight
from coadvise.runs.foresight import _adviser, foresee
from coadvise.runs.plan import Part, plan
from coadvise.training.engine import Engine

Seconds = Callable[[Sequence[str]], dict[str, float]]


@pytest.fixture
def foreseen(tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seconds:
    """Seconds by network where making a batch of views takes a second and a step another one."""
    ticks = count()
    monkeypatch.setattr(foresight.time, "perf_counter", lambda: float(next(ticks)))

    def seconds(overrides: Sequence[str]) -> dict[str, float]:
        config = load_config(tiny_preset, overrides, None, str(tiny_images))
        dataset = scan(source_of(config), config.data.image_size, config.in_memory)
        parts = plan(config, 2, True)
        return {part.name: found for part, found in foresee(parts, tmp_path, config, dataset)}

    return seconds


def test_a_training_takes_its_steps(foreseen: Seconds) -> None:
    assert set(foreseen([]).values()) == {2 * 2 * 2.0}  # 2 s, epochs, steps an epoch: 24 images in batches of 12
    of_other_epochs = foreseen(["teachers.conv.recipe.epochs=5"])
    assert of_other_epochs.pop("teachers/conv") == 20
    assert set(of_other_epochs.values()) == {8}
    accumulated = foreseen(["student.recipe.accumulate=3"])
    assert accumulated["students/advised-1"] == accumulated["students/alone-0"] == 24


def test_of_a_large_batch_a_part_is_timed(foreseen: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "TIMED_IMAGES", 4)
    assert set(foreseen([]).values()) == {24}


def test_a_first_step_that_takes_long_does_not_count(foreseen: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = chain((0, 50, 100), count(101))
    monkeypatch.setattr(foresight.time, "perf_counter", lambda: float(next(ticks)))
    assert set(foreseen([]).values()) == {8}


def test_a_network_s_own_views_are_timed_with_the_loader_s_processes(
    foreseen: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def views(split: ScannedSplit, augment: AugmentConfig, *others: Any) -> Views:
        seen.append(augment.kind)
        return Views(split, augment, *others)

    monkeypatch.setattr(foresight, "Views", views)
    monkeypatch.setattr(foresight, "seconds_with_workers", lambda view, step, workers, device: float(workers))
    assert set(foreseen(["data.workers=3", "teachers.inv.augment.kind=none"]).values()) == {2 * 2 * 3}
    assert seen == ["light", "none", "light", "light"]


def test_students_of_a_cache_ask_no_teacher_and_processes_share_a_step(
    foreseen: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def adviser(part: Part, *others: Any) -> Network:
        asked.append(part.teacher)
        return _adviser(part, *others)

    monkeypatch.setattr(foresight, "_adviser", adviser)
    foreseen(["cache.top_k=2"])
    assert asked == []
    foreseen([])
    assert asked == ["conv", "inv"]
    monkeypatch.setattr(foresight, "TIMED_IMAGES", 4)
    monkeypatch.setattr(Engine, "processes", 3)
    assert set(foreseen([]).values()) == {8}  # of the 12 images of a step each has 4


def test_a_given_teacher_is_timed_as_it_is(finished: Path, foreseen: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    had: list[Network] = []

    def given(*arguments: Any) -> Network:
        had.append(given_network(*arguments))
        return had[-1]

    monkeypatch.setattr(foresight, "given_network", given)
    assert "teachers/conv" not in foreseen([f"teachers.conv.checkpoint={finished / 'teachers' / 'conv'}"])
    assert len(had) == 1
