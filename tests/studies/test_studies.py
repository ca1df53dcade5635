"""Studies as configurations, and a tiny one run from end to end."""

import json
from pathlib import Path

import pytest
from tiny import Stopper, make_images, never, write_preset

from coadvise.errors import UserError
from coadvise.run import TEACHER
from coadvise.studies import STUDIES, Order, Row, Study
from coadvise.study import _plan, foresee_study, run_study
from coadvise.teachers import Teachers


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("study") / "data")


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_from_end_to_end(name: str, images: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path)
    result = run_study(name, images, preset, 1, tmp_path / "out", 1, [])
    assert [row["name"] for row in result["rows"]] == [row.name for row in STUDIES[name].rows]
    assert all(0 <= row["mean"] <= 1 and row["spread"] is None for row in result["rows"])
    assert {order["finding"] for order in result["orders"]} <= {"held", "not held", "within noise"}
    assert json.loads((tmp_path / "out" / f"{name}.json").read_text()) == result
    table = (tmp_path / "out" / f"{name}.md").read_text()
    assert all(row.name in table for row in STUDIES[name].rows)


def test_what_rows_and_studies_share_is_trained_once(images: Path, tmp_path: Path) -> None:
    preset, out, listener = write_preset(tmp_path), tmp_path / "out", Stopper(never)
    run_study("tokens", images, preset, 2, out, 1, [], listener)
    trained = [part for part, done in listener.steps if done == 1]
    assert sorted(trained) == sorted(
        [
            "teachers/conv",
            "teachers/inv",
            *(f"students/{role}-{s}" for role in ("alone", *3 * ["advised"]) for s in (0, 1)),
        ]
    )
    again = Stopper(never)
    first = run_study("tokens", images, preset, 2, out, 1, [], again)
    assert again.steps == []
    other = Stopper(never)
    second = run_study("injection", images, preset, 2, out, 1, [], other)
    assert not [part for part, _ in other.steps if part.startswith("teachers/")]
    shared = {row["name"]: row["top1"] for row in first["rows"]}["class token alone"]
    assert {row["name"]: row["top1"] for row in second["rows"]}["random tokens, no advice"] == shared
    assert all(row["spread"] is not None for row in second["rows"])


def test_students_of_the_same_views_share_one_pass_of_the_teachers(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    forward = Teachers.__call__
    monkeypatch.setattr(
        Teachers, "__call__", lambda self, batch: asked.append(len(self.by_token)) or forward(self, batch)
    )
    run_study("injection", images, write_preset(tmp_path), 1, tmp_path / "out", cache=True)
    caches = [path.parent for path in (tmp_path / "out" / "logits").rglob("cache.json")]
    assert len(caches) == 1
    once = sum(1 for teachers in asked if teachers)
    asked.clear()
    run_study("injection", images, write_preset(tmp_path), 1, tmp_path / "other")
    assert once < sum(1 for teachers in asked if teachers) / 2  # four rows are advised


def test_a_dry_run_names_what_is_left_and_writes_nothing(images: Path, tmp_path: Path) -> None:
    preset, out = write_preset(tmp_path), tmp_path / "out"
    rows = list(foresee_study("tokens", images, preset, 1, out))
    assert len(rows) == 6
    assert all(seconds > 0 for _, seconds in rows)
    assert not out.exists()
    run_study("tokens", images, preset, 1, out)
    assert [seconds for _, seconds in foresee_study("tokens", images, preset, 1, out)] == [0.0] * 6


def test_a_claim_is_held_when_both_intervals_are_clear() -> None:
    rows = [Row("a"), Row("b")]
    assert Study("t", rows, [Order("a", "b")]).orders[0].higher == "a"
    with pytest.raises(AssertionError):
        Study("t", rows, [Order("a", "c")])
    with pytest.raises(AssertionError):
        Study("t", [Row("a"), Row("a")])


def test_a_teacher_s_row_is_the_teacher_s_own_run(tmp_path: Path) -> None:
    from coadvise.config import load_config

    config = load_config(write_preset(tmp_path), source="x")
    plan = _plan(Study("t", [Row("conv", ("conv",), role=TEACHER), Row("both")]), config, 1, tmp_path)
    assert [arm.part for arm in plan.rows["conv"].arms] == ["teachers/conv"]
    assert plan.rows["both"].config.teachers["conv"].checkpoint == str(plan.rows["conv"].folder / "teachers/conv")


def test_what_cannot_be_studied_is_said(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown study 'token', did you mean 'tokens'"):
        run_study("token", images)
    text = (tmp_path / "lone.yaml").name
    (tmp_path / text).write_text("teachers: {a: {model: resnet_small}}\nstudent: {model: cit_micro_patch4_32}\n")
    with pytest.raises(UserError, match=r"row 'class \+ conv token' needs a teacher 'conv', the preset has a"):
        run_study("tokens", images, str(tmp_path / text))
