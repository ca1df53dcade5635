"""Benchmarks: what a table says of its figures; that each runs, without looking at how fast."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import NAMES, run_benchmark
from benchmarks.table import Row, Setting, Table, in_turns, machine

from coadvise.errors import UserError
from coadvise.evaluation.speed import interleaved


def test_a_ratio_above_one_is_better_than_the_peer_in_either_direction():
    assert Row("a", "images/s", ours=30, peer=10).ratio == 3
    assert Row("a", "ms", ours=10, peer=30).ratio == 3
    assert Row("a", "ms", ours=10).ratio is None


def test_a_missed_goal_is_marked_and_json_holds_what_is_printed(tmp_path: Path):
    rows = [Row("slow", "ms", 10, 5, goal=1), Row("fast", "ms", 5, 10, floor=2, goal=1)]
    table = Table("title", "peer", rows, {"batch": 8})
    lines = list(table.lines())
    assert "1!" in next(line for line in lines if line.startswith("slow"))
    assert "!" not in next(line for line in lines if line.startswith("fast"))
    assert lines[3].split() == ["peer", "coadvise", "ratio", "floor", "goal", "unit"]
    assert [line.split() for line in lines[4:]] == [
        ["slow", "5", "10", "0.5", "-", "1!", "ms"],
        ["fast", "10", "5", "2", "2", "1", "ms"],
    ]
    table.write(tmp_path / "table.json")
    record = json.loads((tmp_path / "table.json").read_text())
    assert [row["ratio"] for row in record["rows"]] == [0.5, 2.0]
    assert record["about"] == {"batch": 8}


def test_calls_take_turns_and_the_first_round_is_not_counted():
    calls = []
    seconds = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, synchronise=lambda: None
    )
    assert calls == ["a", "b"] * 3
    assert seconds.keys() == {"a", "b"}


def test_runs_take_turns_step_by_step_whatever_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
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

    def broken(progress) -> None:
        progress("b", 1, 8, {})
        raise UserError("out of breath")

    with pytest.raises(UserError, match="out of breath"):
        in_turns({"a": run("a"), "b": broken, "c": run("c")}, turn=1, skip=1, synchronise=lambda: None)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("stp", "float32"), "step"),
        (("step", "float16"), "bfloat16"),
        (("step", "float32", 0, 1, False, "gpu"), "cuda"),
    ],
)
def test_what_there_is_none_of_is_named(arguments, word):
    with pytest.raises(UserError, match=word):
        run_benchmark(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_runs(name: str):
    table = run_benchmark(name, "float32", batch_size=4, repeats=1, device="cpu")
    assert all(row.ours > 0 for row in table.rows)
    assert name == "growth" or all(row.floor for row in table.rows)
    assert table.about["torch"] == torch.__version__
    assert Setting(torch.device("cpu")).dtype == torch.float32


def test_a_machine_is_described_with_what_was_asked_of_it():
    about = machine(Setting(torch.device("cpu"), "bfloat16", compile=True))
    assert (about["precision"], about["compiled"]) == ("bfloat16", "yes")
    assert machine(Setting(torch.device("cpu")))["compiled"] == "no"
    assert Setting(torch.device("cpu"), "bfloat16").dtype == torch.bfloat16
