"""What the pages say of plans, ranks and scale is what the committed records say, and the records keep the goals."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import plan, ranks, scale

ROOT = Path(__file__).parents[2]
SCALE = (ROOT / "docs/SCALE.md").read_text()


def record(name: str) -> Any:
    return json.loads((ROOT / "results/plan" / f"{name}.json").read_text())


def test_steps_are_foreseen_within_a_fifth_and_on_the_page() -> None:
    found = record("steps")
    assert {(row["pixels"], row["batch"]) for row in found["rows"]} == {
        (s, b) for s in plan.SIZES for b in plan.BATCHES
    }
    assert len(found["rows"]) == 27
    assert max(abs(row["foreseen_ms"] / row["measured_ms"] - 1) for row in found["rows"]) <= plan.GOAL
    assert "\n".join(plan.lines(found["rows"])) in (ROOT / "docs/PERFORMANCE.md").read_text()


def test_a_step_sends_what_a_plan_foresees() -> None:
    found = record("ranks")
    for one in found["2"].values():
        assert one["gradients"] == one["foreseen_gradients"] > 0
        assert one["buffers"] == one["foreseen_buffers"]
    assert "\n".join(ranks.lines(found["1"], found["2"])) in SCALE


def test_a_rank_of_very_many_pictures_holds_and_takes_no_more() -> None:
    found = record("scale")["cases"]
    few, *many = found
    assert found[-1]["pictures"] == 10**9
    for case in many:
        assert case["memory_mb"] <= few["memory_mb"]
        assert case["step_ms"] <= 3 * few["step_ms"]
    assert "\n".join(scale.lines(found)) in SCALE


def test_the_simulation_asks_for_a_rank_s_own_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "BATCH", 2048)
    found = scale.simulate(2**21 + 5, 2, 4, tmp_path)
    assert found["views"] == 2 * 2048 // scale.RANKS, "each and the one it is mixed with"
    assert found["steps"] == 2 * ((2**21 + 5) // 2048)
