"""Benchmarks: a table and its figures, timing in turns, and that each runs, whatever its speed."""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from benchmarks import NAMES, decode, deploy, export, involution, loader, scan, shards, startup
from benchmarks.table import Row, Setting, Table, in_turns
from tiny import records

from coadvise.config.schema import AugmentConfig
from coadvise.data.scan import presized_split
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.studies import STUDIES
from coadvise.studies.networks import PAPER_MODELS

CPU = Setting(torch.device("cpu"), "bfloat16", batch_size=4, repeats=1, compile=True)


def test_a_ratio_above_one_is_better_a_missed_goal_is_marked_and_json_has_what_is_printed(tmp_path: Path) -> None:
    assert Row("a", "images/s", ours=30, peer=10).ratio == Row("a", "ms", ours=10, peer=30).ratio == 3
    assert Row("a", "ms", ours=10).ratio is None
    rows = [Row("slow", "ms", 10, 5, goal=1), Row("fast", "ms", 5, 10, floor=2, goal=1)]
    table = Table("title", "peer", rows, {"batch": 8})
    assert [line.split() for line in list(table.lines())[3:]] == [
        ["peer", "coadvise", "ratio", "floor", "goal", "unit"],
        ["slow", "5", "10", "0.5", "-", "1!", "ms"],
        ["fast", "10", "5", "2", "2", "1", "ms"],
    ]
    table.write(tmp_path / "table.json")
    record = json.loads((tmp_path / "table.json").read_text())
    assert [row["ratio"] for row in record["rows"]] == [0.5, 2.0]
    assert record["about"] == {"batch": 8}


def test_runs_take_turns_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    order, clock, takes = list[str](), [0.0], {"a": 1.0, "b": 2.0, "c": 3.0}
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def run(name: str):
        def steps(progress) -> None:
            for step in range(1, 9):
                order.append(name)
                clock[0] += takes[name] * (1 if step < 5 else 3) if 2 < step < 7 else 99.0
                progress(name, step, 8, {})

        return steps

    seconds = in_turns({name: run(name) for name in "abc"}, turn=2, skip=1, synchronise=lambda: None)
    assert order == list("aabbcc" * 4)
    assert seconds == {name: 2 * value for name, value in takes.items()}, "neither the first turn nor the last counts"


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("names", ["ab", "ba", "abc"])
def test_a_failing_run_ends_the_others(names: str, steps: int) -> None:
    def endless(progress) -> None:
        for step in range(1, 1000):
            progress("", step, 1000, {})

    def broken(progress) -> None:
        for step in range(1, 1 + steps):
            progress("", step, 1000, {})
        raise ValueError("broken")

    runs = {name: broken if name == "b" else endless for name in names}
    with pytest.raises(ValueError, match="broken"):
        in_turns(runs, turn=1, skip=1, synchronise=lambda: None)


def test_what_is_timed_on_a_device_are_views(tmp_path: Path) -> None:
    source, augment = open_source(Path(__file__).parents[1] / "photos"), AugmentConfig(kind="deit", erase=0.25)
    photos = presized_split(source, "val", 64, tmp_path, lambda text: None)
    calls = loader.on_device(photos, augment, 6, CPU)
    made = calls["the device's part"]()
    assert [batch.images.shape for batch in made] == [(6, 3, 224, 224)] * 2
    usual = Views(photos, augment, loader.CLASSES, 224, seed=0)[0, np.arange(6)]
    assert (made[0].images - usual.images).abs().mean() < 0.001
    assert all(values.dtype == torch.float32 for values in calls["floor of the device's part"]())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "scan")) for name in NAMES])
def test_every_benchmark_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "COMMANDS", ("presets", "fit /does/not/exist"))
    monkeypatch.setattr("benchmarks.floor.best_seconds", lambda call, setting: 1.0)  # large products take seconds
    monkeypatch.setattr(involution, "REDNET26", involution.REDNET26[-2:])  # the smallest
    monkeypatch.setattr(involution, "SIZE", 64)
    monkeypatch.setattr(decode, "SIZE", (1640, 1230))
    monkeypatch.setattr(decode, "SEEDS", 1)
    monkeypatch.setattr(scan, "CLASSES", 2)
    monkeypatch.setattr(scan, "FEW", 4)
    monkeypatch.setattr(shards, "BATCHES", 2)
    monkeypatch.setattr(export, "COMPARISONS", export.COMPARISONS[:1])
    few = {model: timm.create_model(model, depth=1).eval() for model in export.COMPARISONS[0][1:3]}
    monkeypatch.setattr(export, "networks", lambda: few)
    table = import_module(f"benchmarks.{name}").run(Setting(torch.device("cpu"), batch_size=4, repeats=1))
    assert all(row.ours > 0 for row in table.rows)
    assert all(row.floor for row in table.rows) or name == "export"
    assert table.about["torch"] == torch.__version__


def test_accuracy_over_speed_of_a_run_s_networks(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["teachers/conv", "students/advised-0"]  # each export takes seconds
    monkeypatch.setattr(deploy, "trained_parts", lambda run: parts)
    monkeypatch.setattr(sys, "argv", ["deploy", str(finished), "--repeats", "1", "--out", str(tmp_path)])
    deploy.main()
    record = json.loads((tmp_path / "finished.json").read_text())
    names = ["conv teacher", "co-advised student", "co-advised student, int8"]
    assert [point["name"] for point in record["networks"]] == names
    for point, part in zip(record["networks"], parts, strict=False):
        (result,) = (r for r in records(finished, "result") if r["part"] == part)
        assert point["top1"] == 100 * result["top1"]["class"]
        assert point["images_per_second"] > 0
    assert (tmp_path / "finished.svg").read_text().count('class="mark"') == len(names)
    assert (tmp_path / "finished.md").read_text() in capsys.readouterr().out


def test_published_accuracies_are_the_paper_s() -> None:
    printed = {row.name: row.paper.get("top1") for row in STUDIES["table3"].rows}
    for name in (name for group in deploy.PAPER.values() for name in group):
        assert printed[name]
        assert deploy.SHORT.get(name, name) in PAPER_MODELS
