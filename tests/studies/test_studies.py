"""Studies as configurations, and a tiny one run from end to end."""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from studied import Studied, StudyStopper
from tiny import ONE_EPOCH, Stopper, make_images, never, write_preset

from coadvise.config import TeacherConfig, load_config
from coadvise.distill.teachers import Teachers
from coadvise.errors import Interrupted, UserError
from coadvise.runs.network_job import initial_network
from coadvise.runs.options import StudyOptions
from coadvise.runs.parallel import Task, in_processes
from coadvise.runs.plan import ADVISED, TEACHER
from coadvise.studies import STUDIES, Order, Row, Study
from coadvise.studies.capacity import DEPTHS
from coadvise.studies.columns import TOP1
from coadvise.studies.plan import StudyPlan, plan_study, row_config, study_config
from coadvise.studies.runner import estimate_study, run_study
from coadvise.studies.students import SMALL_RESNET10

ONE = "both teachers through one output"


@pytest.fixture(scope="module")
def images(studied: Studied) -> Path:
    return studied.images


def planned(study: str | Study, preset: str = "small-images", *overrides: str, **more: Any) -> StudyPlan:
    """The plan of a study, by its name or as it is, whose folder is `out`."""
    name = study if isinstance(study, str) else "tokens"
    options = StudyOptions.of(name=name, data="x", out="out", **more)
    config = load_config(preset, overrides, source="x")
    return plan_study(STUDIES[study] if isinstance(study, str) else study, config, options)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_from_end_to_end(name: str, studied: Studied) -> None:
    study = STUDIES[name]
    result, _ = studied.run(name)
    again, trained = studied.run(name)
    assert trained == [], "nothing is trained twice"
    clock = lambda found: [{**row["figures"], "images_per_second": None} for row in found["rows"]]  # noqa: E731
    assert clock(again) == clock(result)
    result = again
    assert [row["name"] for row in result["rows"]] == [row.name for row in study.rows]
    assert all(list(row["figures"]) == [column.name for column in study.columns] for row in result["rows"])
    shares = [row["figures"]["top1"] for row in result["rows"] if "top1" in row["figures"]]
    assert all(0 <= share["mean"] <= 1 and share["spread"] is None for share in shares)
    assert {order["finding"] for order in result["orders"]} <= {"held", "not held", "within noise"}
    assert json.loads((studied.out / f"{name}.json").read_text()) == result
    table = (studied.out / f"{name}.md").read_text()
    assert all(row.name in table for row in study.rows)
    assert all(column.heading in table and column.note in table for column in study.columns)
    assert (studied.out / f"{name}.svg").exists() == (study.figure is not None)


def test_equal_networks_of_different_studies_are_one() -> None:
    plans = {name: planned(name).rows for name in STUDIES}
    for same in (
        (("architectures", "plain transformer, alone"), ("students", "transformer, alone")),
        (("naive", "conv + inv, both on the class token, summed"), ("students", f"transformer, {ONE}")),
        (("tokens", "class + conv token"), ("architectures", "one token, conv teacher")),
        (("tokens", "class + conv + inv token"), ("divergence", "average")),
        (("tokens", "class token alone"), ("shift", "student alone")),
        (("teachers", "inv teacher"), ("architectures", "inv teacher")),
    ):
        assert len({plans[study][row].folder for study, row in same}) == 1, same


def test_a_study_s_rows_say_which_tokens_are_advised_whatever_the_preset_s_are() -> None:
    for study in STUDIES:
        one, *others = (
            set(planned(study, "small-images", f"teachers.conv.token={token}", f"teachers.inv.token={token}").runs)
            for token in ("null", "class", "[class, conv]")
        )
        assert all(other == one for other in others)


@pytest.mark.parametrize("preset", ["digits", "small-images", "photos"])
def test_every_study_s_networks_can_be_made_of_every_preset(preset: str) -> None:
    made = set()
    for study in STUDIES:
        for task in planned(study, preset).runs.values():
            for part in task.parts:
                if part.role == TEACHER and not task.config.teachers[part.teacher].trained_here:
                    continue
                network = task.config.teachers[part.teacher] if part.role == TEACHER else task.config.student
                kind = network.model, str(network.model_kwargs), task.config.tokens * (part.role != TEACHER)
                if kind not in made:
                    with torch.device("meta"):
                        assert initial_network(part, task.config, ("a", "b")).parameter_count > 0
                    made.add(kind)
    assert len(made) >= 13


def test_the_figure_has_a_point_for_each_row(studied: Studied) -> None:
    result, _ = studied.run("capacity")
    root = ElementTree.parse(studied.out / "capacity.svg").getroot()
    marks = [element for element in root.iter() if element.get("class") == "mark"]
    assert len(marks) == len(result["rows"]) == 8
    assert len({element.get("fill") for element in marks}) == 2
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert texts.count("larger") == 2
    assert {"the teacher's top-1 %", "conv teacher", "inv teacher"} <= set(texts)


def _rank(row: Row, column: str) -> Any:
    """How high the paper puts a row in a column: what it claims to be higher has more."""
    preset = load_config("small-images", source="x")
    config = row_config(row, preset)
    name, teacher = next(iter(config.teachers.items()))
    if column.startswith("kl_"):  # a token is nearer to its own teacher
        return row.answer != column.removeprefix("kl_")
    if column.startswith("same_as_"):
        return name.rstrip("2") == column.removeprefix("same_as_")
    if column == "above_teacher":  # where this is worse
        return -teacher.recipe.epochs, -sum(teacher.model_kwargs.get("depths", DEPTHS[teacher.model]))  # type: ignore[arg-type]
    if column == "above_alone":  # for the transformer
        return config.student.model == preset.student.model
    aligned: Any = config.student.model_kwargs.get("aligned", {})
    kinds = {name.rstrip("2") for name in config.teachers}
    advice = (row.role == ADVISED, len(kinds), len(config.tokens), len(aligned))
    return tuple(-n for n in advice) if column == "corruption_error" else advice


@pytest.mark.parametrize("name", STUDIES)
def test_claims_are_the_right_way_round(name: str) -> None:
    rows = {row.name: row for row in STUDIES[name].rows}
    for order in STUDIES[name].orders:
        higher, lower = (_rank(rows[row], order.column) for row in (order.higher, order.lower))
        assert higher > lower, order


@pytest.mark.parametrize("name", STUDIES)
def test_no_two_rows_are_of_the_same_answers(name: str) -> None:
    plan = planned(name)
    shown = {(plan.rows[row.name].folder, row.role, row.answer) for row in STUDIES[name].rows}
    assert len(shown) == len(STUDIES[name].rows)


@pytest.mark.parametrize(("preset", "resnet"), [("small-images", SMALL_RESNET10), ("photos", {})])
def test_other_students_suit_the_images_and_have_the_heads_their_rows_name(preset: str, resnet: Any) -> None:
    config = load_config(preset, source="x")
    for row in STUDIES["students"].rows:
        found = row_config(row, config)
        assert found.tokens == (("conv", "inv") if row.name.endswith("separate heads") else ())
        assert not row.name.startswith("ResNet") or found.student.model_kwargs == resnet


def test_runs_of_rows_teachers_and_seeds(tmp_path: Path) -> None:
    preset = write_preset(tmp_path)
    plan = planned(Study("t", [Row("conv", ("conv",), role=TEACHER), Row("both")]), preset)
    assert [part.name for part in plan.rows["conv"].parts] == ["teachers/conv"]
    assert plan.rows["both"].config.teachers["conv"].checkpoint == str(plan.rows["conv"].folder / "teachers/conv")
    assert plan.title_of(plan.rows["conv"]) == "conv"
    assert planned("divergence").title_of(planned("divergence").rows["average"]) == "class token (and 3 more)"
    plan = planned("tokens", preset, "seed=5", seeds=2)
    for row, role in (("class token alone", "alone"), ("class + conv token", "advised")):
        assert [part.name for part in plan.rows[row].students] == [f"students/{role}-{seed}" for seed in (5, 6)]
    assert {part.seed for run in plan.runs.values() for part in run.teachers} == {5}


def test_logits_are_stored_once_whichever_token_they_advise(images: Path, tmp_path: Path) -> None:
    options = StudyOptions.of(
        name="naive", data=images, preset=write_preset(tmp_path), overrides=["cache.top_k=5"], cache=True
    )
    plan = plan_study(STUDIES["naive"], study_config(options), options)
    assert len({run.cache for name, run in plan.rows.items() if name.startswith("conv + inv")}) == 1
    assert len({run.cache for run in plan.rows.values()}) == 3
    assert {run.config.cache.top_k for run in plan.rows.values() if run.config.cache} == {5}
    assert {run.cache for run in planned("naive").runs.values()} == {None}


def test_networks_are_shared_by_rows_studies_and_caches(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from another directory, and with other settings that change no result."""
    preset, listener = write_preset(tmp_path), StudyStopper(never)
    forward, calls = Teachers.__call__, list[int]()
    monkeypatch.setattr(
        Teachers, "__call__", lambda self, batch: calls.append(len(self.by_name)) or forward(self, batch)
    )
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "images").symlink_to(images)
    monkeypatch.chdir(tmp_path / "here")
    common: dict[str, Any] = {"preset": preset, "cache": True, "seeds": 2}
    first = run_study("tokens", "images", listener, out="study", **common)
    trained = [part for part, done in listener.steps if done == 1 and part != "logit cache"]
    students = [f"students/{role}-{seed}" for role in ("alone", *3 * ["advised"]) for seed in (0, 1)]
    assert sorted(trained) == sorted(["teachers/conv", "teachers/inv", *students])
    assert sum(1 for teachers in calls if teachers) <= 2 * 2 * 3 + 6, "each set of teachers sees each view once"
    monkeypatch.chdir(tmp_path)
    common |= {"out": "here/study", "overrides": ["data.workers=1", "engine.checkpoint_seconds=30"]}
    options = StudyOptions.of(name="tokens", data="here/images", **common)
    assert {seconds for _, seconds in estimate_study(options)} == {0.0}
    other = StudyStopper(never)
    second = run_study("injection", "here/images", other, **common)
    assert not [part for part, _ in other.steps if part.startswith("teachers/")]
    shared = {row["name"]: row["figures"] for row in first["rows"]}["class token alone"]
    assert {row["name"]: row["figures"] for row in second["rows"]}["random tokens, no advice"] == shared
    assert all(row["figures"]["top1"]["spread"] is not None for row in second["rows"])


def test_a_stopped_study_continues_to_the_same_figures(studied: Studied, tmp_path: Path) -> None:
    stopper = StudyStopper(lambda part, step: (part, step) == ("students/advised-0", 2))
    common: dict[str, Any] = {"preset": studied.preset, "out": tmp_path / "out"}
    options = StudyOptions.of(name="divergence", data=studied.images, **common)
    assert all(seconds > 0 for _, seconds in estimate_study(options))
    assert not (tmp_path / "out").exists()
    with pytest.raises(Interrupted):
        run_study("divergence", studied.images, stopper, **common)
    assert not (tmp_path / "out" / "divergence.json").exists()
    listener = StudyStopper(never)
    result = run_study("divergence", studied.images, listener, **common)
    assert listener.steps == [("students/advised-0", 3), ("students/advised-0", 4)]
    whole, _ = studied.run("divergence")
    assert [row["figures"] for row in result["rows"]] == [row["figures"] for row in whole["rows"]]


def test_changed_images_make_a_study_again(studied: Studied, tmp_path: Path) -> None:
    images = Path(shutil.copytree(studied.images, tmp_path / "images"))
    common: dict[str, Any] = {"preset": studied.preset, "overrides": ONE_EPOCH}
    run_study("divergence", images, out=tmp_path / "out", **common)
    shutil.copy(images / "train" / "red" / "1.png", images / "train" / "blue" / "0.png")
    (images / "val" / "red" / "0.png").unlink()
    with pytest.raises(UserError, match=r"training images: 1 replaced.*validation images: 1 removed"):
        run_study("divergence", images, out=tmp_path / "out", **common)
    listener = StudyStopper(never)
    again = run_study("divergence", images, listener, out=tmp_path / "out", allow_changes=True, jobs=2, **common)
    assert {part.rpartition("/")[2] for part, step in listener.steps if step == 1} == {"conv", "inv", "advised-0"}
    new = run_study("divergence", images, out=tmp_path / "new", **common)
    assert [row["figures"] for row in again["rows"]] == [row["figures"] for row in new["rows"]]


def test_what_a_study_names_it_has() -> None:
    for rows, orders in (([Row("a"), Row("b")], [Order("a", "c")]), ([Row("a"), Row("a")], [])):
        with pytest.raises(AssertionError):
            Study("t", rows, orders)
    with pytest.raises(AssertionError):
        Study("t", [Row("a"), Row("b")], [Order("a", "b", "kl_conv")], [TOP1])


def test_teachers_of_other_sizes_and_epochs_are_derived_from_the_preset() -> None:
    def teachers(preset: str, row: str) -> TeacherConfig:
        config = load_config(preset, source="x")
        chosen = next(r for r in STUDIES["capacity"].rows if r.name == row)
        return row_config(chosen, config).teachers[row.partition(" ")[0]]

    whole = load_config("small-images").teachers["inv"].recipe
    quarter = teachers("small-images", "inv teacher, 1/4 of its epochs").recipe
    assert (quarter.epochs, quarter.warmup_epochs) == (round(whole.epochs / 4), whole.warmup_epochs / 4)
    assert teachers("small-images", "conv teacher, larger").model_kwargs["depths"] == [2, 2, 2, 2]
    assert teachers("photos", "inv teacher, larger").model == "rednet50"


def test_what_cannot_be_studied_is_named(images: Path, tmp_path: Path) -> None:
    preset, lone = write_preset(tmp_path), tmp_path / "lone.yaml"
    lone.write_text("teachers: {a: {model: resnet_small}}\nstudent: {model: cit_micro_patch4_32}\n")
    one_class = make_images(tmp_path / "one", classes=["cat"])
    given = ["teachers.inv.checkpoint=elsewhere"]
    for name, data, preset_file, overrides, says in (
        ("token", images, preset, [], "'token', did you mean 'tokens'"),
        ("tokens", images, str(lone), [], "teacher 'conv'"),
        ("teachers", one_class, preset, [], "'cat'"),
        ("capacity", images, preset, ["teachers.conv.model=resnet10t"], "teachers.conv.model=resnet10t"),
        ("knowledge", images, preset, given, "leave out teachers.inv.checkpoint"),
        ("divergence", images, preset, ["teachers.conv.weight=0"], "teachers.conv.weight"),
        ("divergence", images, preset, ["student.weight=0", "teachers.conv.token=[conv, class]"], "student.weight"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            run_study(name, data, preset=preset_file, out=tmp_path / "out", overrides=overrides)
    assert not (tmp_path / "out").exists()


def test_several_jobs_find_the_same_figures(studied: Studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First runs side by side, then the students of the last run."""
    monkeypatch.setattr("coadvise.runs.parallel.available_cores", lambda: 2)  # one thread a process, as this one has
    one, _ = studied.run("tokens", seeds=2)
    out = shutil.copytree(studied.out, tmp_path / "out")
    for row in one["rows"][1:]:
        shutil.rmtree(out / "students" / Path(row["run"]).name)
    side_by_side: list[set[str]] = []

    def watched(tasks: Mapping[str, Task], *others: Any) -> None:
        side_by_side.append(set(tasks))
        in_processes(tasks, *others)

    for module in ("studies.runner", "runs.fit"):
        monkeypatch.setattr(sys.modules[f"coadvise.{module}"], "in_processes", watched)
    listener = Stopper(never)
    two = run_study("tokens", studied.images, listener, preset=studied.preset, seeds=2, out=out, jobs=2)
    assert side_by_side[0] == {"class + conv token", "class + inv token"}
    assert any({"students/advised-0", "students/advised-1"} <= tasks for tasks in side_by_side[1:])
    assert [row["figures"] for row in two["rows"]] == [row["figures"] for row in one["rows"]]
    assert two["orders"] == one["orders"]
    assert ("class + conv token: students/advised-0", 1) in listener.steps
