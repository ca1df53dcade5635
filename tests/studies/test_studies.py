"""Studies as configurations, and a tiny one run from end to end."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from studied import Studied, StudyStopper
from tiny import CLASSES, Stopper, make_images, never, write_preset

from coadvise.config import TeacherConfig, load_config
from coadvise.distill.teachers import Teachers
from coadvise.errors import Interrupted, UserError
from coadvise.runs.evaluate import evaluate_run
from coadvise.runs.network_job import initial_network
from coadvise.runs.parallel import Task, in_processes
from coadvise.runs.plan import ADVISED, TEACHER
from coadvise.studies import STUDIES, Order, Row, Study
from coadvise.studies.capacity import DEPTHS
from coadvise.studies.runner import _configuration, _one_by_one, _plan, _prepare, foresee_study, run_study
from coadvise.studies.students import SMALL_RESNET10

ONE = "both teachers through one output"


@pytest.fixture(scope="module")
def images(studied: Studied) -> Path:
    return studied.images


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_from_end_to_end(name: str, studied: Studied) -> None:
    study = STUDIES[name]
    result, _ = studied.run(name)
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


@pytest.mark.parametrize("name", STUDIES)
def test_a_finished_study_trains_nothing_again(name: str, studied: Studied) -> None:
    first, _ = studied.run(name)
    again, trained = studied.run(name)
    assert trained == []
    for result in (first, again):
        for row in result["rows"]:
            row["figures"].pop("images_per_second", None)  # a clock's
    assert again["rows"] == first["rows"]
    assert all(seconds == 0 for _, seconds in foresee_study(name, studied.images, studied.preset, 1, studied.out))


def test_equal_networks_of_different_studies_are_one() -> None:
    config = load_config("small-images", source="x")
    plans = {name: _plan(study, config, 1, Path("out")).rows for name, study in STUDIES.items()}
    for same in (
        (("architectures", "plain transformer, alone"), ("students", "transformer, alone")),
        (("naive", "conv + inv, both on the class token, summed"), ("students", f"transformer, {ONE}")),
        (("tokens", "class + conv token"), ("architectures", "one token, conv teacher")),
        (("tokens", "class + conv token"), ("capacity", "conv teacher, all its epochs")),
        (("tokens", "class + conv + inv token"), ("students", "transformer, both through separate heads")),
        (("tokens", "class + conv + inv token"), ("divergence", "average")),
        (("tokens", "class token alone"), ("shift", "student alone")),
        (("injection", "both aligned, advised"), ("architectures", "both tokens aligned, both teachers")),
        (("teachers", "inv teacher"), ("architectures", "inv teacher")),
    ):
        assert len({plans[study][row].folder for study, row in same}) == 1, same


def test_a_student_alone_is_the_same_whatever_its_teachers_are() -> None:
    plans = [
        _plan(STUDIES["tokens"], load_config("small-images", overrides, source="x"), 1, Path("out")).rows
        for overrides in ([], ["teachers.conv.temperature=3", "teachers.inv.recipe.epochs=7"])
    ]
    same = {
        row: one.folder == other.folder for (row, one), other in zip(plans[0].items(), plans[1].values(), strict=True)
    }
    assert [row for row, is_same in same.items() if is_same] == ["class token alone"]


def test_a_study_s_rows_say_which_tokens_are_advised_whatever_the_preset_s_are() -> None:
    configs = [
        load_config("small-images", [f"teachers.{name}.token={token}" for name in ("conv", "inv")], source="x")
        for token in ("null", "class", "[class, conv]")
    ]
    for study in STUDIES.values():
        one, *others = (set(_plan(study, config, 1, Path("out")).tasks) for config in configs)
        assert all(other == one for other in others)


@pytest.mark.parametrize("preset", ["digits", "small-images", "photos"])
def test_every_study_s_networks_can_be_made_of_every_preset(preset: str) -> None:
    config = load_config(preset, source="x")
    made = set()
    for study in STUDIES.values():
        for task in _plan(study, config, 1, Path("out")).tasks.values():
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


def test_what_rows_and_studies_share_is_trained_once(images: Path, tmp_path: Path) -> None:
    preset, out, listener = write_preset(tmp_path), tmp_path / "out", StudyStopper(never)
    run_study("tokens", images, preset, 2, out, 1, [], listener)
    trained = [part for part, done in listener.steps if done == 1]
    assert sorted(trained) == sorted(
        [
            "teachers/conv",
            "teachers/inv",
            *(f"students/{role}-{s}" for role in ("alone", *3 * ["advised"]) for s in (0, 1)),
        ]
    )
    again = StudyStopper(never)
    first = run_study("tokens", images, preset, 2, out, 1, [], again)
    assert again.steps == []
    other = StudyStopper(never)
    second = run_study("injection", images, preset, 2, out, 1, [], other)
    assert not [part for part, _ in other.steps if part.startswith("teachers/")]
    shared = {row["name"]: row["figures"] for row in first["rows"]}["class token alone"]
    assert {row["name"]: row["figures"] for row in second["rows"]}["random tokens, no advice"] == shared
    assert all(row["figures"]["top1"]["spread"] is not None for row in second["rows"])


def test_students_of_the_same_views_share_one_pass_of_the_teachers(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    forward = Teachers.__call__
    monkeypatch.setattr(
        Teachers, "__call__", lambda self, batch: asked.append(len(self.by_name)) or forward(self, batch)
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


def test_a_study_goes_on_from_another_directory(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its paths are relative to, and with other settings that change no number."""
    preset = write_preset(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "images").symlink_to(images)
    monkeypatch.chdir(tmp_path / "here")
    found = run_study("divergence", "images", preset, 1, "study")
    monkeypatch.chdir(tmp_path)
    quicker = ["data.workers=1", "engine.checkpoint_seconds=30"]
    foreseen = foresee_study("divergence", "here/images", preset, 1, "here/study", quicker)
    assert [seconds for _, seconds in foreseen] == [0.0] * 3
    again = StudyStopper(never)
    result = run_study("divergence", "here/images", preset, 1, tmp_path / "here" / "study", 1, quicker, again)
    assert again.steps == []
    for row, before in zip(result["rows"], found["rows"], strict=True):
        assert row["figures"] == before["figures"]


def test_networks_that_several_rows_share_are_shown_by_the_first(images: Path, tmp_path: Path) -> None:
    shown = [network for network, _ in foresee_study("divergence", images, write_preset(tmp_path), 1, tmp_path / "out")]
    assert shown[-1] == "student co-advised (seed 0): class token (and 3 more)"


def test_a_stopped_study_goes_on_to_the_same_figures(studied: Studied, tmp_path: Path) -> None:
    stopper = StudyStopper(lambda part, step: (part, step) == ("students/advised-0", 2))
    with pytest.raises(Interrupted):
        run_study("divergence", studied.images, studied.preset, 1, tmp_path, listener=stopper)
    assert not (tmp_path / "divergence.json").exists()
    listener = StudyStopper(never)
    result = run_study("divergence", studied.images, studied.preset, 1, tmp_path, listener=listener)
    assert listener.steps == [("students/advised-0", 3), ("students/advised-0", 4)]
    whole, _ = studied.run("divergence")
    assert [row["figures"] for row in result["rows"]] == [row["figures"] for row in whole["rows"]]


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
    config = _configuration(row, preset)
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
    plan = _plan(STUDIES[name], load_config("small-images", source="x"), 1, Path("out"))
    shown = {(plan.rows[row.name].folder, row.role, row.answer) for row in STUDIES[name].rows}
    assert len(shown) == len(STUDIES[name].rows)


@pytest.mark.parametrize(("preset", "resnet"), [("small-images", SMALL_RESNET10), ("photos", {})])
def test_other_students_suit_the_images_and_have_the_heads_their_rows_name(preset: str, resnet: Any) -> None:
    config = load_config(preset, source="x")
    for row in STUDIES["students"].rows:
        found = _configuration(row, config)
        assert found.tokens == (("conv", "inv") if row.name.endswith("separate heads") else ())
        assert not row.name.startswith("ResNet") or found.student.model_kwargs == resnet


def test_what_a_study_names_it_has() -> None:
    with pytest.raises(AssertionError):
        Study("t", [Row("a"), Row("b")], [Order("a", "c")])
    with pytest.raises(AssertionError):
        Study("t", [Row("a"), Row("a")])


def test_a_teacher_s_row_is_the_teacher_s_own_run(tmp_path: Path) -> None:
    config = load_config(write_preset(tmp_path), source="x")
    plan = _plan(Study("t", [Row("conv", ("conv",), role=TEACHER), Row("both")]), config, 1, tmp_path)
    assert [part.name for part in plan.rows["conv"].parts] == ["teachers/conv"]
    assert plan.rows["both"].config.teachers["conv"].checkpoint == str(plan.rows["conv"].folder / "teachers/conv")


def test_a_study_s_seeds_follow_the_configuration_s(tmp_path: Path) -> None:
    plan = _plan(STUDIES["tokens"], load_config(write_preset(tmp_path), ["seed=5"], source="x"), 2, tmp_path)
    for row, role in (("class token alone", "alone"), ("class + conv token", "advised")):
        students = [part for part in plan.rows[row].parts if part.role != TEACHER]
        assert [(part.name, part.seed) for part in students] == [(f"students/{role}-{seed}", seed) for seed in (5, 6)]
    assert {part.seed for task in plan.tasks.values() for part in task.parts if part.role == TEACHER} == {5}


def test_logits_are_stored_once_whichever_token_they_advise(images: Path, tmp_path: Path) -> None:
    _, _, plan = _prepare("naive", images, write_preset(tmp_path), 1, tmp_path, ["cache.top_k=5"], True)
    assert len({task.cache for name, task in plan.rows.items() if name.startswith("conv + inv")}) == 1
    assert len({task.cache for task in plan.rows.values()}) == 3
    assert {task.config.cache.top_k for task in plan.rows.values() if task.config.cache} == {5}
    _, _, plain = _prepare("naive", images, write_preset(tmp_path), 1, tmp_path, [], False)
    assert {task.cache for task in plain.tasks.values()} == {None}


@pytest.mark.parametrize(("name", "how"), [("knowledge", "twice, from two seeds"), ("capacity", "anew")])
def test_a_given_teacher_is_refused_where_it_has_to_be_trained(name: str, how: str) -> None:
    config = load_config("small-images", ["teachers.inv.checkpoint=inv.pth"], source="x")
    with pytest.raises(UserError, match=rf"'inv' is a given one, and this study trains it {how}.*leave out"):
        _plan(STUDIES[name], config, 1, Path("out"))


def test_teachers_of_other_sizes_and_epochs_are_derived_from_the_preset() -> None:
    def teachers(preset: str, row: str) -> TeacherConfig:
        config = load_config(preset, source="x")
        chosen = next(r for r in STUDIES["capacity"].rows if r.name == row)
        return _configuration(chosen, config).teachers[row.partition(" ")[0]]

    whole = load_config("small-images").teachers["inv"].recipe
    quarter = teachers("small-images", "inv teacher, 1/4 of its epochs").recipe
    assert (quarter.epochs, quarter.warmup_epochs) == (round(whole.epochs / 4), whole.warmup_epochs / 4)
    assert teachers("small-images", "conv teacher, larger").model_kwargs["depths"] == [2, 2, 2, 2]
    assert teachers("photos", "inv teacher, larger").model == "rednet50"


def test_a_given_teacher_is_scored_as_it_is(studied: Studied, tmp_path: Path) -> None:
    of_three, _ = studied.run("teachers")
    taught = Path(of_three["rows"][0]["run"]) / "teachers" / "conv"
    two = make_images(tmp_path / "two", train=6, val=3, classes=CLASSES[1:])
    listener = StudyStopper(never)
    overrides = [f"teachers.conv.checkpoint={taught}", "teachers.inv.recipe.batch_size=6"]
    result = run_study("teachers", two, studied.preset, 1, tmp_path / "out", 1, overrides, listener)
    assert {part for part, _ in listener.steps} == {"teachers/inv", "corruptions"}
    run = Path(result["rows"][0]["run"])
    rescored = evaluate_run(run)  # it knows more classes than the data has
    assert rescored["classes"] == 2
    assert rescored["parts"]["teachers/conv"]["class"]["top1"] == result["rows"][0]["figures"]["top1"]["mean"]


def test_what_cannot_be_studied_is_said(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown study 'token', did you mean 'tokens'"):
        run_study("token", images)
    with pytest.raises(UserError, match="seeds=0; at least one student a row is needed"):
        run_study("tokens", images, seeds=0)
    text = (tmp_path / "lone.yaml").name
    (tmp_path / text).write_text("teachers: {a: {model: resnet_small}}\nstudent: {model: cit_micro_patch4_32}\n")
    with pytest.raises(UserError, match=r"row 'class \+ conv token' needs a teacher 'conv', the preset has a"):
        run_study("tokens", images, str(tmp_path / text))
    preset = write_preset(tmp_path)
    one = make_images(tmp_path / "one", classes=["cat"])
    with pytest.raises(UserError, match="holds one class, 'cat'; at least two are needed"):
        run_study("teachers", one, preset, 1, tmp_path / "out")
    with pytest.raises(UserError, match=r"teachers.conv.model=resnet10t: this study knows no larger one"):
        run_study("capacity", images, preset, 1, tmp_path / "out", 1, ["teachers.conv.model=resnet10t"])
    with pytest.raises(UserError, match=r"leave out teachers.inv.checkpoint and .pretrained"):
        run_study("capacity", images, preset, 1, tmp_path / "out", 1, ["teachers.inv.checkpoint=elsewhere"])
    with pytest.raises(UserError, match=r"row 'conv token' is what token 'conv' answers, and no teacher with a weight"):
        run_study("divergence", images, preset, 1, tmp_path / "out", 1, ["teachers.conv.weight=0"])
    on_class = ["student.weight=0", "teachers.conv.token=[conv, class]"]
    with pytest.raises(
        UserError, match=r"in row 'class token' nothing would train the class token; give student.weight"
    ):
        run_study("divergence", images, preset, 1, tmp_path / "out", 1, on_class)
    assert not (tmp_path / "out").exists()


def test_two_runs_at_a_time_find_what_one_after_the_other_does(
    studied: Studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # one thread a process, as this one has
    one, _ = studied.run("tokens")
    listener = Stopper(never)
    out = tmp_path / "two"
    two = run_study("tokens", studied.images, studied.preset, out=out, jobs=2, listener=listener)
    assert [row["figures"] for row in two["rows"]] == [row["figures"] for row in one["rows"]]
    assert two["orders"] == one["orders"]
    said = {part for part, _ in listener.steps}
    assert {"class token alone: students/alone-0", "class + conv token: students/advised-0"} <= said
    assert {path.name for path in (out / "students").iterdir()} == {Path(row["run"]).name for row in one["rows"]}


@pytest.mark.parametrize(
    ("students", "jobs", "one_by_one"),
    [
        ([3, 3, 3], 2, 1),  # two rounds for the last one, in place of three
        ([3, 3, 3, 3], 2, 0),
        ([0, 0, 3], 2, 1),
        ([3, 3, 3], 4, 0),  # three rounds either way
        ([3, 3], 4, 2),
        ([1, 1, 1], 2, 0),
        ([1, 1, 1], 4, 0),
        ([0, 0], 4, 0),
        ([3, 3, 3], 1, 0),
        ([], 2, 0),
    ],
)
def test_the_last_runs_leave_no_core_idle(students: list[int], jobs: int, one_by_one: int) -> None:
    assert _one_by_one(students, jobs) == one_by_one


def test_students_of_the_last_run_are_trained_side_by_side(
    studied: Studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    one, _ = studied.run("tokens", seeds=2)
    out = tmp_path / "out"
    shutil.copytree(studied.out, out)
    for row in one["rows"][1:]:
        shutil.rmtree(out / "students" / Path(row["run"]).name)
    side_by_side: list[set[str]] = []

    def watched(tasks: Mapping[str, Task], *others: Any) -> None:
        side_by_side.append(set(tasks))
        in_processes(tasks, *others)

    for module in ("study", "fit"):
        monkeypatch.setattr(sys.modules[f"coadvise.{module}"], "in_processes", watched)
    two = run_study("tokens", studied.images, studied.preset, 2, out, jobs=2)
    assert side_by_side[0] == {"class + conv token", "class + inv token"}
    assert any({"students/advised-0", "students/advised-1"} <= tasks for tasks in side_by_side[1:])
    assert [row["figures"] for row in two["rows"]] == [row["figures"] for row in one["rows"]]


def test_of_runs_side_by_side_one_that_fails_ends_the_study(studied: Studied, tmp_path: Path) -> None:
    poison = ["student.recipe.learning_rate=1e30"]
    with pytest.raises(UserError, match=r"students/\w+-0: .* not finite"):
        run_study("tokens", studied.images, studied.preset, out=tmp_path, jobs=2, overrides=poison)
