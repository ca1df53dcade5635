"""A whole plan, a small calibration, and counts of networks that take longer to build."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import scale
from tests.costs.conftest import calibration  # noqa: F401  (a fixture)
from tests.costs.test_count import PARTS, check_counts

from coadvise.config.reading import load_config, with_changes
from coadvise.costs import calibrate
from coadvise.costs.ask import question
from coadvise.costs.foresee import HIDDEN, Foreseen, Question, foresee, network_of
from coadvise.costs.gpus import gpu_named
from coadvise.costs.machine import Calibration, of_calibration, of_sheet
from coadvise.costs.table import breaks, lines, plain
from coadvise.runs.options import PlanOptions
from coadvise.runs.plan import ADVISED, Part
from coadvise.storage import bytes_text


@pytest.fixture
def asked(tiny_preset: str, calibration: Calibration) -> Question:  # noqa: F811
    return Question(load_config(tiny_preset), 1200, 3, of_calibration(calibration, 32e9), 0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("part", PARTS[1:], ids=lambda part: part.teacher or part.role)
def test_counts_of_an_involution_teacher_and_a_student(part: Part, half: bool, tiny_preset: str) -> None:
    check_counts(tiny_preset, part, half)


def test_a_whole_plan_as_text_and_as_json(asked: Question) -> None:
    config = with_changes(asked.config, {"teachers.inv": asked.config.teachers["conv"].model_dump(mode="json")})
    plan = foresee(replace(asked, config=config, baseline=True, seeds=2))
    assert [one.part.role for one in plan.networks] == ["teacher", "teacher", "advised", "alone", "advised", "alone"]
    advised, alone = plan.networks[2:4]
    assert advised.seconds > alone.seconds
    assert 0 < advised.teachers < 1 == 1 + alone.teachers
    assert plan.minutes <= sum(one.minutes for one in plan.networks) < plan.minutes * plan.jobs * 1.0001
    text = "\n".join(lines(plan))
    assert "1,200 images of 3 classes at 16 pixels on made, float32" in text
    assert all(one.part.title in text for one in plan.networks)
    record = plain(plan)
    assert record["networks"][0]["minutes"] == plan.networks[0].minutes
    assert record["disk"]["cache"] == 2 * 2 * 1200 * 2 * 2 * 3, "seeds, epochs, images, teachers, float16, classes"
    assert breaks(plan) == []
    assert "augment.kind=deit" in breaks(replace(plan, question=replace(asked, images=10**8)))[0]


def test_a_small_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """On few networks of few pixels, and without the time it usually takes."""
    monkeypatch.setattr(calibrate, "NETWORKS", calibrate.NETWORKS[:1])
    monkeypatch.setattr(calibrate, "SHAPES", ((16, 2), (24, 4)))
    monkeypatch.setattr(calibrate, "ALL_CORES", ())
    monkeypatch.setattr(calibrate, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "PICTURES", 2)
    monkeypatch.setattr(calibrate, "precisions", lambda gpu: ("float32",))
    monkeypatch.setattr(calibrate, "VIEW_SIDES", (16, 24))
    monkeypatch.setattr(calibrate, "_scale_of_all_cores", lambda one, half: one.scale / 2)
    said: list[str] = []
    found = calibrate.calibrate(said.append)
    assert torch.get_num_threads() == 1, "as before"
    assert "float32, 1" in found.rates
    for rates in found.rates.values():
        assert rates.issue + rates.scale > 0
        assert {"convolutions", "norms", "elementwise and copies", "updates"} <= rates.kinds.keys()
    assert all(cost.seconds(1000) > 0 for cost in found.views.values())
    assert any("views" in line for line in said)


def test_the_plans_of_the_page_are_what_is_foreseen() -> None:
    page = (Path(__file__).parents[2] / "docs/SCALE.md").read_text()
    assert "\n".join(scale.plans()) in page


def test_what_the_page_says_of_eight_gpus_and_of_four_nodes_is_what_is_foreseen() -> None:
    def student(nodes: int, batch: int, network: float) -> Foreseen:
        recipe = (f"student.recipe.batch_size={batch}", f"teachers.inv.recipe.batch_size={batch}", "data.presize=288")
        options = PlanOptions.of(
            preset="imagenet1k", overrides=recipe, images=1_281_167, gpu="H100", gpus=8, nodes=nodes, network=network
        )
        asked = replace(question(options), target=of_sheet(gpu_named("H100"), None))
        return network_of(asked, Part("students/advised-0", ADVISED, 0), threads=1)

    one, four = student(1, 1024, 100.0), student(4, 1024, 100.0)
    large, slow = student(4, 4096, 100.0), student(4, 4096, 10.0)
    page = " ".join((Path(__file__).parents[2] / "docs/SCALE.md").read_text().partition("**On paper")[2].split())
    assert (
        f"sends {bytes_text(one.sent)} a step and process on 8 GPUs, {1e3 * one.exchanging:.1f} ms at 450 GB/s" in page
    )
    assert f"{1e3 * HIDDEN * sum(one.computing.values()):.0f} ms of its backward pass hide" in page
    assert (
        f"On 4 nodes it sends {bytes_text(four.sent)}; at 100 Gbit/s a node that is {1e3 * four.exchanging:.0f} ms"
        in page
    )
    assert f"a step takes {1e3 * four.seconds:.0f} ms instead of {1e3 * one.seconds:.0f}" in page
    assert f"4 nodes do the work of {one.seconds / four.seconds:.1f}" in page
    assert large.waiting == 0
    assert f"it takes {1e3 * slow.exchanging:.0f} ms, of which {1e3 * slow.waiting:.0f} are waited for" in page
    assert f"and 4 nodes do the work of {4 * one.seconds / slow.seconds:.1f}." in page
