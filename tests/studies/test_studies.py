"""Studies as configurations, and a tiny one run from end to end."""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import timm
import torch
from studied import Studied, StudyStopper
from tiny import ONE_EPOCH, Stopper, make_images, never, write_preset

from coadvise.config.reading import load_config
from coadvise.config.schema import TeacherConfig
from coadvise.distill.teachers import Teachers
from coadvise.errors import Interrupted, UserError
from coadvise.runs.executors.base import Executor, Task
from coadvise.runs.network_job import initial_network
from coadvise.runs.options import StudyOptions
from coadvise.runs.plan import ADVISED, TEACHER
from coadvise.studies import STUDIES, Claim, Row, Study
from coadvise.studies.measures import MEASURES
from coadvise.studies.networks import PAPER_MODELS, scaled
from coadvise.studies.plan import StudyPlan, plan_study, row_config, study_config
from coadvise.studies.question import over
from coadvise.studies.result import draw
from coadvise.studies.runner import estimate_study, run_study
from coadvise.studies.table4 import SMALL_MIXER, SMALL_RESNET10
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener

BOTH = "ResNet-18 + RedNet-26"


@pytest.fixture(scope="module")
def images(studied: Studied) -> Path:
    return studied.images


def planned(study: str | Study, preset: str = "small-images", *overrides: str, **more: Any) -> StudyPlan:
    """The plan of a study, by its name or as it is, whose folder is `out`."""
    name = study if isinstance(study, str) else "table7"
    options = StudyOptions.of(name=name, data="digits", out="out", **more)
    config = load_config(preset, overrides, source="digits")
    return plan_study(STUDIES[study] if isinstance(study, str) else study, config, options)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_from_end_to_end(name: str, studied: Studied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEASURES, "images_per_second", lambda rows, context: [{0: 1.0} for _ in rows])  # minutes
    study = STUDIES[name]
    result, _ = studied.run(name)
    again, trained = studied.run(name)
    assert trained == [], "nothing is trained twice"
    clock = lambda found: [{**row["figures"], "images_per_second": None} for row in found["rows"]]  # noqa: E731
    assert clock(again) == clock(result)
    result = again
    assert [row["name"] for row in result["rows"]] == [row.name for row in study.rows]
    assert all(list(row["figures"]) == [column.name for column in study.columns] for row in result["rows"])
    runs = {row["name"]: row["run"] for row in result["rows"]}
    trained = lambda row: runs[row] is not None  # noqa: E731
    shares = [row["figures"]["top1"] for row in result["rows"] if row["run"] is not None]
    assert len(shares) >= 2
    assert all(0 <= share["mean"] <= 1 and share["spread"] is None for share in shares)
    assert {claim["finding"] for claim in result["claims"]} <= {"held", "not held", "within noise", "not judged"}
    exact = ("parameters", "images_per_second")
    for claim, told in zip(study.claims, result["claims"], strict=True):
        chosen = bool(told["rows"])  # no two rows may be nearly equal
        known = claim.column not in ("imagenet_a", "imagenet_r") and all(map(trained, told["rows"]))
        assert (told["difference"] is not None) == (chosen and (claim.column in exact or known))
        judged = claim.column in exact or told["over"]["images"] is not None  # of one seed
        assert (told["finding"] != "not judged") == judged
    assert json.loads((studied.out / f"{name}.json").read_text()) == result
    table = (studied.out / f"{name}.md").read_text()
    assert all(row.name in table for row in study.rows)
    assert all(column.heading in table and column.note in table for column in study.columns)
    assert (studied.out / f"{name}.svg").exists() == (study.figure is not None)


def test_equal_networks_of_different_studies_are_one() -> None:
    plans = {name: planned(name).rows for name in STUDIES}
    for same in (
        (("table3", "DeiT-S"), ("table4", "Transformer-Ti, no teacher"), ("table6", "Transformer-Ti, no teacher"),
         ("table7", "1 token, no teacher")),
        (("table3", "DeiT-S-KD"), ("table4", "Transformer-Ti, ResNet-18"), ("table6", "Transformer-Ti, ResNet-18"),
         ("figure4", "ResNet-18, all its epochs")),
        (("table3", "CiT-S"), ("table4", f"Transformer-Ti, {BOTH}"), ("table5", "CiT-Ti inv token"),
         ("table6", f"Transformer-Ti, {BOTH}"), ("table7", f"3 tokens, {BOTH}"),
         ("table9", "Random w/ KD, conv token")),
        (("table4", f"Mixer-Ti, {BOTH}"), ("table5", "Mixer-Ti")),
        (("table8", "no stem"), ("table9", "Random w/o KD, inv token")),
        (("table8", "both stems"), ("table9", "Align w/o KD, inv token")),
        (("table1", "ResNet-50"), ("table6", "ResNet-50")),
        (("table2", "CiT-S: RedNet-101"), ("table6", "RedNet-26"), ("knowledge", "RedNet-26")),
    ):  # fmt: skip
        assert len({plans[study][row].folder for study, row in same}) == 1, same


def test_a_study_s_rows_say_which_tokens_are_advised_whatever_the_preset_s_are() -> None:
    for study in STUDIES:
        one, *others = (
            set(planned(study, "small-images", *overrides).runs)
            for overrides in (
                [],
                ["teachers.conv.token=class", "teachers.inv.token=class"],
                ["teachers.conv.token=[class, conv]", "student.label_tokens=[class, conv]"],
            )
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
    assert len(made) >= 20


def test_a_student_is_said_to_have_the_stems_that_it_has() -> None:
    for study, preset in [
        ("gain", "small-images"),
        ("table7", "small-images"),
        ("attention", "small-images"),
        ("gain", "digits"),
    ]:
        plan = planned(study, preset)
        last = plan.rows[STUDIES[study].rows[-1].name].config.student
        has_stems = any(
            "stems" in name for name, _ in timm.create_model(last.model, **last.model_kwargs).named_modules()
        )
        assert ("not aligned" in plan.networks["Transformer-Ti"]) == (not has_stems)


def test_the_figure_has_a_point_for_each_row(studied: Studied) -> None:
    result, _ = studied.run("figure4")
    root = ElementTree.parse(studied.out / "figure4.svg").getroot()
    marks = [element for element in root.iter() if element.get("class") == "mark"]
    assert len(marks) == len(result["rows"]) == 12
    assert len({element.get("fill") for element in marks}) == 3
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"18, 1/4", "600M, all", "50, all"} <= set(texts)
    assert {"the teacher's top-1 %", "ResNet", "RegNetY", "RedNet"} <= set(texts)


def test_a_figure_of_gains_has_the_intervals_of_their_claims() -> None:
    study = STUDIES["gain"]
    claims = [
        {
            "rows": claim.weights({}),
            "over": {"seeds": None, "images": {"mean": 0.04, "low": 0.03, "high": 0.05 + n / 100}},
        }
        for n, claim in enumerate(study.claims)
    ]
    figure = {"mean": 0.04, "spread": None}
    rows = [
        {"name": row.name, "figures": {"gain": figure, "lead": figure}} for row in study.rows if row.role == ADVISED
    ]
    root = ElementTree.fromstring(draw(study, {"rows": rows, "claims": claims}))
    marks = [element for element in root.iter() if element.get("class") == "mark"]
    bars = [
        e for e in root.iter() if e.tag.endswith("}line") and e.get("stroke") in {mark.get("fill") for mark in marks}
    ]
    lengths = [abs(float(bar.get("y1", 0)) - float(bar.get("y2", 0))) for bar in bars]
    assert len(marks) == len(rows) == len(bars)
    assert sorted(length / min(lengths) for length in lengths) == pytest.approx(
        [1 + n / 2 for n in range(len(rows))], rel=0.02
    )


@pytest.mark.parametrize("name", STUDIES)
def test_no_two_rows_are_of_the_same_answers(name: str) -> None:
    plan = planned(name)
    trained = [row for row in STUDIES[name].rows if row.name in plan.rows]
    different = 8 if name == "gain" else len(trained)  # of 30 digits a class there are 20, and all
    assert len({(plan.rows[row.name].folder, row.role, row.answer) for row in trained}) == different
    assert len(trained) == len(STUDIES[name].rows) or name in ("table2", "table3")


@pytest.mark.parametrize(
    ("preset", "resnet", "mixer"), [("small-images", SMALL_RESNET10, SMALL_MIXER), ("photos", {}, {})]
)
def test_other_students_suit_the_images_and_have_a_head_a_teacher(preset: str, resnet: Any, mixer: Any) -> None:
    config, wanted = load_config(preset, source="digits"), {"ResNet-10": resnet, "Mixer-Ti": mixer}
    for row in STUDIES["table4"].rows:
        found = row_config(row, config)
        one_output = row.beyond or row.role != ADVISED
        assert found.tokens == (() if one_output else row.teachers)
        assert found.student.model_kwargs == wanted.get(row.name.partition(",")[0], found.student.model_kwargs)


def test_runs_of_rows_teachers_and_seeds(tmp_path: Path) -> None:
    preset = write_preset(tmp_path)
    plan = planned(Study("t", "", [Row("conv", ("conv",), role=TEACHER), Row("both")]), preset)
    assert [part.name for part in plan.rows["conv"].parts] == ["teachers/conv"]
    assert plan.rows["both"].config.teachers["conv"].start == str(plan.rows["conv"].folder / "teachers/conv")
    assert plan.title_of(plan.rows["conv"]) == "conv"
    assert planned("table5").title_of(planned("table5").rows["CiT-Ti average"]) == "CiT-Ti conv token (and 3 more)"
    plan = planned("table7", preset, "seed=5", seeds=2)
    for row, role in (("1 token, no teacher", "alone"), ("1 token, ResNet-18", "advised")):
        assert [part.name for part in plan.rows[row].students] == [f"students/{role}-{seed}" for seed in (5, 6)]
    assert {part.seed for run in plan.runs.values() for part in run.teachers} == {5}


def test_logits_are_stored_once_whichever_token_they_advise(images: Path, tmp_path: Path) -> None:
    options = StudyOptions.of(
        name="table7", data=images, preset=write_preset(tmp_path), overrides=["cache.top_k=5"], cache=True
    )
    plan = plan_study(STUDIES["table7"], study_config(options), options)
    assert len({run.cache for name, run in plan.rows.items() if BOTH in name or "mean" in name}) == 1
    assert (
        len({run.cache for run in plan.rows.values()}) == 4
    )  # by conv, by inv, by both, and none for the student alone
    assert {run.config.cache.top_k for run in plan.rows.values() if run.config.cache} == {5}
    assert {run.cache for run in planned("table7").runs.values()} == {None}


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
    first = run_study("table7", "images", listener, out="study", **common)
    trained = [part for part, done in listener.steps if done == 1 and part != "logit cache"]
    students = [f"students/{role}-{seed}" for role in ("alone", *5 * ["advised"]) for seed in (0, 1)]
    assert sorted(trained) == sorted(["teachers/conv", "teachers/inv", *students])
    assert sum(1 for teachers in calls if teachers) <= 2 * 2 * 3 + 6, "each set of teachers sees each view once"
    monkeypatch.chdir(tmp_path)
    common |= {"out": "here/study", "overrides": ["data.max_unreadable=0.2", "engine.checkpoint_seconds=30"]}
    options = StudyOptions.of(name="table7", data="here/images", **common)
    assert estimate_study(options, print, lambda network, seconds: None).seconds == 0
    other = StudyStopper(never)
    second = run_study("table8", "here/images", other, **common)
    assert not [part for part, _ in other.steps if part.startswith("teachers/")]
    shared = {row["name"]: row["figures"]["top1"]["seeds"] for row in first["rows"]}[f"3 tokens, {BOTH}"]
    assert {row["name"]: row["figures"]["top1"]["seeds"] for row in second["rows"]}["no stem, advised"] == shared
    assert all(row["figures"]["top1"]["spread"] is not None for row in second["rows"])


def test_a_stopped_study_continues_to_the_same_figures(studied: Studied, tmp_path: Path) -> None:
    stopper = StudyStopper(lambda part, step: (part, step) == ("students/advised-0", 2))
    common: dict[str, Any] = {"preset": studied.preset, "out": tmp_path / "out"}
    options = StudyOptions.of(name="table5", data=studied.images, **common)
    told: dict[str, float] = {}
    assert estimate_study(options, print, told.__setitem__).seconds == pytest.approx(sum(told.values()))
    assert told
    assert all(seconds > 0 for seconds in told.values())
    assert not (tmp_path / "out").exists()
    with pytest.raises(Interrupted):
        run_study("table5", studied.images, stopper, **common)
    assert not (tmp_path / "out" / "table5.json").exists()
    listener = StudyStopper(never)
    result = run_study("table5", studied.images, listener, **common)
    assert listener.steps[:2] == [("students/advised-0", 3), ("students/advised-0", 4)]
    assert [part for part, done in listener.steps if done == 1] == 2 * ["students/advised-0"]
    whole, _ = studied.run("table5")
    assert [row["figures"] for row in result["rows"]] == [row["figures"] for row in whole["rows"]]


def test_changed_images_make_a_study_again(studied: Studied, tmp_path: Path) -> None:
    images = Path(shutil.copytree(studied.images, tmp_path / "images"))
    common: dict[str, Any] = {"preset": studied.preset, "overrides": ONE_EPOCH}
    run_study("knowledge", images, out=tmp_path / "out", **common)
    shutil.copy(images / "train" / "red" / "1.png", images / "train" / "blue" / "0.png")
    (images / "val" / "red" / "0.png").unlink()
    with pytest.raises(UserError, match=r"training images: 1 replaced.*validation images: 1 removed"):
        run_study("knowledge", images, out=tmp_path / "out", **common)
    listener = StudyStopper(never)
    again = run_study("knowledge", images, listener, out=tmp_path / "out", allow_changes=True, **common)
    assert {part.rpartition("/")[2] for part, step in listener.steps if step == 1} == {"conv", "conv2", "inv", "inv2"}
    new = run_study("knowledge", images, out=tmp_path / "new", **common)
    assert [row["figures"] for row in again["rows"]] == [row["figures"] for row in new["rows"]]


def test_what_a_study_names_it_has() -> None:
    for rows, claims in (
        ([Row("a"), Row("b")], [Claim("", "1", over("a", "c"))]),
        ([Row("a"), Row("b")], [Claim("", "1", over("a", "b"), "kl_conv")]),
        ([Row("a"), Row("a")], []),
        ([Row("a", beyond=True), Row("b")], []),
    ):
        with pytest.raises(AssertionError):
            Study("t", "", rows, claims)


def test_teachers_of_other_sizes_and_epochs_are_derived_from_the_preset() -> None:
    def teacher(preset: str, study: str, row: str) -> TeacherConfig:
        (found,) = row_config(
            next(r for r in STUDIES[study].rows if r.name == row), load_config(preset)
        ).teachers.values()
        return found

    whole = load_config("small-images").teachers["inv"].recipe
    quarter = teacher("small-images", "figure4", "RedNet-26, 1/4 of its epochs").recipe
    assert (quarter.epochs, quarter.warmup_epochs) == (round(whole.epochs / 4), whole.warmup_epochs / 4)
    assert teacher("small-images", "table6", "ResNet-50").model_kwargs["depths"] == [2, 2, 2, 2]
    assert teacher("small-images", "figure4", "RegNetY-200M, all its epochs").model == "regnety_002"
    assert teacher("photos", "figure4", "RedNet-50, all its epochs").model == "rednet50"
    sizes = [sum(scaled((1, 2, 2), factor)) for factor in (1, 1.5, 2, 3, 4)]
    assert sizes == [5, 8, 10, 15, 20]


def test_the_paper_s_own_networks() -> None:
    """Those of each row; in imagenet100, they are the preset's."""

    def models(study: str, row: str, preset: str = "photos") -> list[str]:
        plan = planned(study, preset, networks="paper")
        config = plan.rows[row].config
        assert plan.networks == {}
        return [teacher.model for teacher in config.teachers.values()] + [config.student.model]

    assert models("table3", "CiT-S")[-1] == "cit_small_patch16_224"
    assert models("table3", "CiT-Ti")[-1] == models("table6", f"Transformer-Ti, {BOTH}")[-1] == "cit_tiny_patch16_224"
    teachers = {row: run.teachers for row, run in planned("table2", "photos", networks="paper").rows.items()}
    assert [part.name for parts in teachers.values() for part in parts] == 2 * ["teachers/conv", "teachers/inv"]
    for row, model in (("CiT-Ti: RegNetY-600M", "regnety_006"), ("CiT-S: RedNet-101", "rednet101")):
        assert models("table2", row)[0] == model
    for row in STUDIES["table1"].rows:
        assert models("table1", row.name)[0] == PAPER_MODELS[row.name]
    for study in ("table4", "table6", "table7"):
        same = {
            networks: [run.folder for run in planned(study, "imagenet100", networks=networks).rows.values()]
            for networks in ("preset", "paper")
        }
        assert same["preset"] == same["paper"]


def test_given_weights_take_the_place_of_training(tmp_path: Path) -> None:
    for name in ("resnet50.pth", "vit_base_patch16_224.safetensors", "resnet18.bin"):
        (tmp_path / name).write_bytes(b"weights")
    with_weights: dict[str, Any] = {"weights": str(tmp_path)}
    rows = planned("table3", "small-images", **with_weights).rows
    assert {"ResNet-50", "ViT-B/16"} == rows.keys() - planned("table3").rows.keys()
    assert rows["ResNet-50"].config.teachers["resnet50"].start == str(tmp_path / "resnet50.pth")
    given = planned("table1", "imagenet100", networks="paper", **with_weights).rows
    assert [row for row, run in given.items() if not all(t.trained_here for t in run.config.teachers.values())] == [
        "ResNet-18", "ResNet-50"
    ]  # fmt: skip
    for study in ("figure4", "table7"):  # varies how teachers train, trains the preset's own
        with pytest.raises(UserError, match=f"--weights: no network of {study} takes any"):
            planned(study, "small-images", **with_weights)
    published = planned("table3", weights="pretrained").rows
    assert published["ViT-L/16"].config.teachers["vit_large_patch16_224"].start
    assert "RedNet-152" not in published, "timm has no weights of it"


def test_weights_for_other_classes_are_refused_before_training(images: Path, tmp_path: Path) -> None:
    weights = timm.create_model("deit_tiny_patch16_224", img_size=16).state_dict()
    torch.save(weights, tmp_path / "deit_tiny_patch16_224.pth")
    common: dict[str, Any] = {"preset": write_preset(tmp_path), "out": tmp_path / "out"}
    with pytest.raises(UserError, match="'deit_tiny_patch16_224' has 1000 classes"):
        run_study("table3", images, weights=str(tmp_path), **common)
    assert not (tmp_path / "out").exists()


def test_the_paper_s_rows_alone(studied: Studied) -> None:
    result, trained = studied.run("table7", paper_rows=True, overrides=["seed=3"])
    assert [row["name"] for row in result["rows"]] == [row.name for row in STUDIES["table7"].rows if not row.beyond]
    assert len(trained) == 2 + 5


def test_a_study_so_far_trains_nothing(studied: Studied, tmp_path: Path) -> None:
    def stop(part: str, step: int) -> bool:
        return (part, step) == ("students/advised-0", 1)

    common: dict[str, Any] = {"preset": studied.preset, "out": tmp_path / "out"}
    with pytest.raises(Interrupted):
        run_study("table7", studied.images, StudyStopper(stop), **common)
    listener = StudyStopper(never)
    result = run_study("table7", studied.images, listener, so_far=True, **common)
    assert not listener.steps
    measured = {row["name"]: row["figures"]["top1"]["mean"] is not None for row in result["rows"]}
    assert measured == {name: name == "1 token, no teacher" for name in measured}
    assert {claim["finding"] for claim in result["claims"]} == {"not judged"}
    assert (tmp_path / "out" / "table7.md").read_text().count("not measured") == len(measured) - 1


def test_what_cannot_be_studied_is_named(images: Path, tmp_path: Path) -> None:
    preset, lone = write_preset(tmp_path), tmp_path / "lone.yaml"
    lone.write_text("teachers: {a: {model: resnet_small}}\nstudent: {model: cit_micro_patch4_32}\n")
    one_class = make_images(tmp_path / "one", classes=["cat"])
    given = ["teachers.inv.start=./elsewhere"]
    for name, data, preset_file, overrides, says in (
        ("tabel7", images, preset, [], "'tabel7', did you mean 'table7'"),
        ("table7", images, str(lone), [], "teacher 'conv'"),
        ("table1", one_class, preset, [], "'cat'"),
        ("table1", images, preset, given, "this study trains it as inv38"),
        (
            "knowledge",
            images,
            preset,
            ["teachers.inv.start=rednet26", "teachers.inv.adapt=none"],
            "leave out teachers.inv.start",
        ),
        (
            "figure4",
            images,
            preset,
            ["teachers.conv.start=resnet18", "teachers.conv.adapt=none"],
            "this study trains it with fewer epochs",
        ),
        ("table5", images, preset, ["teachers.conv.weight=0"], "teachers.conv.weight"),
        ("table5", images, preset, ["student.weight=0", "teachers.conv.token=[conv, class]"], "student.weight"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            run_study(name, data, preset=preset_file, out=tmp_path / "out", overrides=overrides)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"networks": "paper"}, "--networks paper at data.image_size=16"),
        ({"networks": "papers"}, "networks=papers, did you mean 'paper'?"),
        ({"weights": str(tmp_path / "none")}, "--weights"),
        ({"weights": str(images)}, "resnet50.pth"),
    ]
    for options, says in wrong:
        with pytest.raises(UserError, match=re.escape(says)):
            run_study("table3", images, preset=preset, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_several_jobs_find_the_same_figures(studied: Studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First runs side by side, then the students of the last run."""
    one, _ = studied.run("table7", seeds=2, paper_rows=True)
    out = shutil.copytree(studied.out, tmp_path / "out")
    for row in one["rows"][1:4]:
        shutil.rmtree(out / "students" / Path(row["run"]).name)
    side_by_side: list[set[str]] = []

    def in_turn(tasks: Mapping[str, Task], executor: Executor, engine: Engine, listener: Listener, *rest: Any) -> None:
        """In this process: that others find the same is tested with the executors."""
        side_by_side.append(set(tasks))
        follow = rest[1] if len(rest) > 1 else lambda record: None
        for task in tasks.values():
            task(SimpleNamespace(say=listener.say, progress=listener.progress, record=follow))

    for module in ("studies.runner", "runs.fit"):
        monkeypatch.setattr(sys.modules[f"coadvise.{module}"], "run_tasks", in_turn)
    listener = Stopper(never)
    common: dict[str, Any] = {"preset": studied.preset, "seeds": 2, "paper_rows": True}
    two = run_study("table7", studied.images, listener, out=out, jobs=2, **common)
    assert side_by_side[0] == {"1 token, ResNet-18", "1 token, RedNet-26"}
    assert any({"students/advised-0", "students/advised-1"} <= tasks for tasks in side_by_side[1:])
    assert [row["figures"] for row in two["rows"]] == [row["figures"] for row in one["rows"]]
    assert two["claims"] == one["claims"]
    assert ("1 token, ResNet-18: students/advised-0", 1) in listener.steps
