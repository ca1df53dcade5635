"""Training times are the median of timed steps, times the number of steps."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

import pytest
import torch
from tiny import Stopper, records

from coadvise import Interrupted, fit
from coadvise.config.schema import EngineConfig
from coadvise.data.scan import scan
from coadvise.data.sources import source_of
from coadvise.runs import estimate as estimate_module
from coadvise.runs.estimate import Forecast, estimate, forecast
from coadvise.runs.options import FitOptions
from coadvise.runs.plan import plan_fit
from coadvise.training import probe
from coadvise.training.engine import Engine

Seconds = Callable[[Sequence[str]], dict[str, float]]


@pytest.fixture
def estimated(tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seconds:
    """Seconds by network if making a batch of views takes one second and a step another one."""
    ticks = count()
    monkeypatch.setattr(estimate_module, "clock_of", lambda engine: lambda: float(next(ticks)))
    monkeypatch.setattr(estimate_module, "STEP_SECONDS", 100.0)

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
    slow, small, larger, first = (0, 50, 100), (101, 102, 103), (104, 105, 106), (107, 150, 200)
    ticks = chain(slow, small, larger, first, count(201))
    monkeypatch.setattr(estimate_module, "clock_of", lambda engine: lambda: float(next(ticks)))
    assert set(estimated([]).values()) == {8}, "neither the first step nor the first of all images counts"


def test_a_slow_network_is_timed_on_few_images(estimated: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "STEP_SECONDS", 8.0)  # two images take two seconds, and eight take two
    assert set(estimated([]).values()) == {2 * 2 * 2.0}
    monkeypatch.setattr(estimate_module, "STEP_SECONDS", 7.0)
    assert set(estimated([]).values()) == {2 * 2 * 2.0 * 12 / 2}


def test_a_probe_sees_few_epochs(estimated: Seconds, finished: Path) -> None:
    start = f"teachers.conv.start={finished / 'teachers' / 'conv'}"
    found = estimated([start, "teachers.conv.adapt=probe", "data.classes=[blue, red]"])
    assert found["teachers/conv"] == probe.EPOCHS * 2.0  # 16 images, a batch of 12


@pytest.mark.parametrize(("seconds", "preset", "wanted"), [
    (6 * 3600, "photos", None),
    (47.6 * 3600, "photos", "48 hours.*--preset photos-small"),
    (9 * 3600, "photos-small", "--preset small-images"),
    (9 * 3600, "small-images", "fewer epochs"),
    (9 * 3600, "my/own.yaml", "fewer epochs"),
])  # fmt: skip
def test_more_than_six_hours_name_what_is_faster(seconds: float, preset: str, wanted: str | None) -> None:
    warning = Forecast(seconds, 2).warning(preset)
    assert warning is None if wanted is None else re.search(wanted, warning or "")


def test_a_run_says_how_long_it_will_take_once_and_trains_the_same(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, worth: float, stopped: bool = False) -> list[str]:
        monkeypatch.setattr(estimate_module, "WORTH_TIMING", worth)
        listener = Stopper(lambda part, step: (stopped, part, step) == (True, "teachers/conv", 1))
        with suppress(Interrupted):
            fit(tiny_images, preset=tiny_preset, out=tmp_path / name, listener=listener)
        return [line for line in listener.said if "on this machine" in line]

    assert run("short", 1e12) == []
    assert len(run("long", 0.0, stopped=True)) == 1
    assert run("long", 0.0) == [], "it only goes on"
    assert records(tmp_path / "long", "train", "eval", "result") == records(
        tmp_path / "short", "train", "eval", "result"
    )


def test_only_a_part_of_a_large_batch_is_timed(estimated: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "TIMED_IMAGES", 4)
    assert set(estimated([]).values()) == {24}
    monkeypatch.setattr(Engine, "processes", 3)
    assert set(estimated([]).values()) == {8}, "of the 12 images of a step each process has 4"


def test_a_busy_machine_is_named(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_fit(FitOptions.of(data=str(tiny_images), preset=tiny_preset, out=tmp_path))
    dataset = scan(source_of(plan.config), plan.config.data.image_size, plan.config.in_memory)
    engine = Engine(plan.config.engine)
    monkeypatch.setattr(estimate_module, "clock_of", lambda engine: count().__next__)
    for share, busy in [(0.5, True), (0.95, False)]:
        clock = count()
        monkeypatch.setattr(estimate_module.time, "process_time", lambda share=share, clock=clock: share * next(clock))
        monkeypatch.setattr(estimate_module.time, "monotonic", count().__next__)
        found = forecast(plan, dataset, engine)
        assert found.share == share
        assert ("other programs" in found.text()) == busy


def test_one_thread_s_own_time_counts_and_several_threads_time_by_the_clock() -> None:
    engine = Engine(EngineConfig(device="cpu"))
    assert estimate_module.clock_of(engine) is time.process_time
    torch.set_num_threads(2)
    assert estimate_module.clock_of(engine) is time.perf_counter
