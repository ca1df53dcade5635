"""Training times are the median of timed steps, times the number of steps."""

from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path

import pytest

from coadvise.data.scan import scan
from coadvise.data.sources import source_of
from coadvise.runs import estimate as estimate_module
from coadvise.runs.estimate import estimate
from coadvise.runs.options import FitOptions
from coadvise.runs.plan import plan_fit
from coadvise.training.engine import Engine

Seconds = Callable[[Sequence[str]], dict[str, float]]


@pytest.fixture
def estimated(tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seconds:
    """Seconds by network if making a batch of views takes one second and a step another one."""
    ticks = count()
    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: float(next(ticks)))

    def seconds(overrides: Sequence[str]) -> dict[str, float]:
        given = {"data": str(tiny_images), "preset": tiny_preset, "overrides": overrides, "out": tmp_path}
        plan = plan_fit(FitOptions.of(**given, seeds=2, baseline=True))
        config = plan.config
        dataset = scan(source_of(config), config.data.image_size, config.in_memory)
        return {part.name: found for part, found in estimate(plan, dataset, Engine(config.engine))}

    return seconds


def test_training_takes_its_steps(finished: Path, estimated: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(estimated([]).values()) == {2 * 2 * 2.0}  # 2 s, epochs, steps an epoch: 24 images in batches of 12
    of_other_epochs = estimated(["teachers.conv.recipe.epochs=5"])
    assert of_other_epochs.pop("teachers/conv") == 20
    assert set(of_other_epochs.values()) == {8}
    accumulated = estimated(["student.recipe.accumulate=3"])
    assert accumulated["students/advised-1"] == accumulated["students/alone-0"] == 24
    assert "teachers/conv" not in estimated([f"teachers.conv.start={finished / 'teachers' / 'conv'}"])
    ticks = chain((0, 50, 100), count(101))
    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: float(next(ticks)))
    assert set(estimated([]).values()) == {8}, "a slow first step does not count"


def test_only_a_part_of_a_large_batch_is_timed(estimated: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "TIMED_IMAGES", 4)
    assert set(estimated([]).values()) == {24}
    monkeypatch.setattr(Engine, "processes", 3)
    assert set(estimated([]).values()) == {8}, "of the 12 images of a step each process has 4"
