import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import (
    CLASSES,
    PRESET,
    Stopper,
    assert_same_weights,
    command,
    contents,
    make_images,
    never,
    records,
    run_program,
    weights_of,
    write_preset,
)

from coadvise import build_cache, fit, load
from coadvise.config import load_config, parse_config, preset_names
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.errors import Interrupted, UserError
from coadvise.evaluation.scores import load_predictions, predict_logits
from coadvise.models.network import create_network, load_network
from coadvise.runs.evaluate import evaluate_run
from coadvise.runs.fit import default_preset, describe, foresee_fit
from coadvise.runs.plan import ADVISED, ALONE, Part, plan
from coadvise.runs.run import trained_parts
from coadvise.training.engine import Engine
from coadvise.training.listener import Silent

job_module, conclude_module = sys.modules["coadvise.runs.network_job"], sys.modules["coadvise.runs.conclude"]
ALL_PARTS = ["teachers/conv", "teachers/inv", "students/advised-0", "students/alone-0"]


def same_run(got: Path, wanted: Path) -> None:
    """Every weight and every number agree."""
    parts = trained_parts(wanted)
    assert trained_parts(got) == parts
    for part in parts:
        assert_same_weights(weights_of(got, part), weights_of(wanted, part))
    for kind in ("train", "eval", "result"):
        assert records(got, kind) == records(wanted, kind)
    assert records(got, "verdict")[-1] == records(wanted, "verdict")[-1]


def trained(listener: Stopper) -> list[str]:
    """The networks that took a step."""
    return list(dict.fromkeys(part for part, _ in listener.steps))


# What a run leaves


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    assert trained_parts(finished) == ALL_PARTS
    for name in ("config.yaml", "data.json", "metrics.jsonl", "report.html"):
        assert (finished / name).stat().st_size > 100
    assert {path.name for path in (finished / "predictions").iterdir()} == {
        f"{part.replace('/', '.')}.safetensors" for part in ALL_PARTS
    }
    assert not any((finished / "checkpoints").iterdir())
    assert [r["kind"] for r in records(finished)][:1] == ["run"]
    results = {r["part"]: r for r in records(finished, "result")}
    assert list(results) == ALL_PARTS
    assert set(results["students/advised-0"]["top1"]) == {"class", "conv", "inv", "average"}
    assert set(results["students/alone-0"]["top1"]) == {"class"}
    verdict = records(finished, "verdict")[-1]
    assert verdict["images"] == 12
    assert "points" in verdict["sentence"]
    data = json.loads((finished / "data.json").read_text())
    assert data["classes"] == list(CLASSES)
    assert data["splits"]["train"]["images"] == 24
    assert data["splits"]["val"]["per_class"] == [4, 4, 4]


def test_config_yaml_alone_makes_the_same_run(finished: Path, tiny_images: Path, tmp_path: Path) -> None:
    again = fit(tiny_images, str(finished / "config.yaml"), tmp_path / "run", baseline=True)
    same_run(again, finished)
    assert (again / "config.yaml").read_bytes() == (finished / "config.yaml").read_bytes()


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    torch.manual_seed(99)  # no global generator has a say
    np.random.seed(99)
    again = fit(tiny_images, tiny_preset, tmp_path / "again", baseline=True)
    same_run(again, finished)
    config = lambda run: yaml.safe_load((run / "config.yaml").read_text())  # noqa: E731
    assert config(again) == config(finished)
    other = fit(tiny_images, tiny_preset, tmp_path / "other", seed=1)
    first, second = weights_of(finished, "teachers/conv"), weights_of(other, "teachers/conv")
    assert not torch.equal(first["fc.weight"], second["fc.weight"])


def test_a_run_keeps_the_precision_that_its_machine_chose(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = partial(fit, tiny_images, tiny_preset, overrides=["engine.precision=auto", "engine.device=cpu"])
    monkeypatch.setattr("coadvise.engine._cpu_has_bfloat16", lambda: True)
    with pytest.raises(Interrupted):
        asked(tmp_path / "run", listener=Stopper(lambda part, step: True))
    assert load_config(str(tmp_path / "run" / "config.yaml")).engine.precision == "bfloat16"
    monkeypatch.setattr("coadvise.engine._cpu_has_bfloat16", lambda: False)
    with pytest.raises(UserError, match=r"engine\.precision: bfloat16 -> float32"):
        asked(tmp_path / "run")


def test_without_an_out_folder_it_names_one(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        run = fit(tiny_images, tiny_preset, seed=3, overrides=FAST)
    finally:
        os.chdir(here)
    assert run == Path("runs") / f"{tiny_images.name}-tiny-seed3"
    assert (tmp_path / run / "report.html").is_file()


RESNET18 = ["teachers.conv.model=resnet18", "teachers.conv.model_kwargs={}"]
FAST = ["teachers.conv.recipe.epochs=1", "teachers.inv.recipe.epochs=1", "student.recipe.epochs=1"]


# Advised and alone


def test_advised_and_alone_start_alike_and_see_the_same_views(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start: dict[str, dict[str, torch.Tensor]] = {}
    views: dict[str, list[Any]] = {}
    real_train, place = job_module.train, Engine.place
    current = [""]

    def train(job: Any, *rest: Any) -> Any:
        current[0] = job.part
        start[job.part] = {name: value.clone() for name, value in job.network.state_dict().items()}
        return real_train(job, *rest)

    def watch(self: Engine, batch: Any) -> Any:
        views.setdefault(current[0], []).append(batch)
        return place(self, batch)

    monkeypatch.setattr(job_module, "train", train)
    monkeypatch.setattr(Engine, "place", watch)
    dropping = "student.model_kwargs.proj_drop_rate=0.2"
    fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, seeds=2, overrides=[dropping, "augment.mixup=0.8"])
    for seed in (0, 1):
        advised, alone = f"students/advised-{seed}", f"students/alone-{seed}"
        assert_same_weights(start[alone], start[advised])
        assert len(views[advised]) == len(views[alone]) == 4
        for one, other in zip(views[advised], views[alone], strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.index, other.index)
    assert not torch.equal(views["students/advised-0"][0].images, views["students/advised-1"][0].images)
    assert not torch.equal(views["teachers/conv"][0].images, views["teachers/inv"][0].images)
    same = [n for n, v in start["students/advised-0"].items() if torch.equal(v, start["students/advised-1"][n])]
    assert not [n for n in same if n.endswith("weight") and "norm" not in n], "two seeds, the same first weights"


def test_alone_the_tokens_heads_are_left_as_they_were(finished: Path) -> None:
    config = parse_config(yaml.safe_load((finished / "config.yaml").read_text()))
    before = job_module.initial_network(Part("students/alone-0", ALONE, 0), config, CLASSES).model.state_dict()
    alone, advised = weights_of(finished, "students/alone-0"), weights_of(finished, "students/advised-0")
    assert job_module.initial_network(Part("x", ADVISED, 0), config, CLASSES).model.head_conv.weight.requires_grad
    for head in ("head_conv.weight", "head_inv.weight"):
        assert torch.equal(alone[head], before[head])
        assert not torch.equal(advised[head], before[head])
    assert not torch.equal(alone["head.weight"], before["head.weight"])


def test_teachers_are_the_same_bytes_after_they_advised(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    class Watch(Stopper):
        before: dict[str, bytes] | None = None

        def progress(self, part: str, *rest: Any) -> None:
            if part.startswith("students/") and self.before is None:
                self.before = contents(tmp_path / "run" / "teachers")

    watch = Watch(never)
    run = fit(tiny_images, tiny_preset, tmp_path / "run", listener=watch)
    assert watch.before
    assert contents(run / "teachers") == watch.before


# Going on


@pytest.mark.parametrize(("part", "step"), [(ALL_PARTS[0], 1), (ALL_PARTS[1], 2), (ALL_PARTS[2], 3), (ALL_PARTS[3], 1)])
def test_stopped_in_any_network_the_same_call_goes_on(
    part: str, step: int, finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    stopper = Stopper(lambda p, s: (p, s) == (part, step))
    with pytest.raises(Interrupted, match=part):
        fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, listener=stopper)
    rest = Stopper(never)
    fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, listener=rest)
    assert stopper.steps + rest.steps == [(p, s) for p in ALL_PARTS for s in (1, 2, 3, 4)]
    assert f"{part}: going on from step {step}" in rest.said
    same_run(tmp_path / "run", finished)


def test_stopped_in_the_last_step_the_next_network_stops(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    stopper = Stopper(lambda p, s: (p, s) == ("teachers/conv", 4))
    with pytest.raises(Interrupted, match="stopped at step 1 of 4 of teachers/inv"):
        fit(tiny_images, tiny_preset, tmp_path / "run", listener=stopper)
    assert trained_parts(tmp_path / "run") == ["teachers/conv"]


def test_a_finished_run_is_not_trained_again(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    files = {name: data for name, data in contents(run).items() if name.startswith(("teachers", "students", "pred"))}
    again = Stopper(never)
    fit(tiny_images, tiny_preset, run, baseline=True, listener=again)
    assert again.steps == []
    assert [text for text in again.said if text.endswith("done already")] == [
        "conv teacher: done already",
        "involution teacher: done already",
        "student co-advised (seed 0): done already",
        "student alone (seed 0): done already",
    ]
    assert {n: d for n, d in contents(run).items() if n.startswith(("teachers", "students", "pred"))} == files
    same_run(run, finished)


def test_a_baseline_and_seeds_are_added_to_a_finished_run(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Stopper(never)
    fit(tiny_images, tiny_preset, run, listener=first)
    assert trained(first) == ALL_PARTS[:3]
    assert "run again with --baseline" in records(run, "verdict")[-1]["sentence"]
    second = Stopper(never)
    fit(tiny_images, tiny_preset, run, baseline=True, listener=second)
    assert trained(second) == ["students/alone-0"]
    assert records(run, "verdict")[-1]["difference"]["seeds"] is None
    assert records(run, "verdict")[-1]["remark"].startswith("That is one student of each kind; ")
    third = Stopper(never)
    fit(tiny_images, tiny_preset, run, baseline=True, seeds=2, listener=third)
    assert trained(third) == ["students/advised-1", "students/alone-1"]
    verdict = records(run, "verdict")[-1]
    assert "one student of each kind" not in (verdict["remark"] or "")
    assert verdict["seeds"] == [0, 1]
    assert verdict["difference"]["seeds"]["n"] == 2
    tops = {record["part"]: record["top1"] for record in records(run, "result")}
    for row in verdict["rows"]:
        assert (row["difference"] is not None) == row["name"].startswith("student co-advised")
        if found := row["difference"]:
            gains = [
                tops[f"students/advised-{n}"][row["answer"]] - tops[f"students/alone-{n}"]["class"] for n in (0, 1)
            ]
            assert found["mean"] == pytest.approx(np.mean(gains))
            assert found["seeds"]["mean"] == pytest.approx(np.mean(gains))
            assert found["low"] <= found["mean"] <= found["high"]
    assert [row["difference"] for row in verdict["rows"] if row["answer"] == "class"][-1] == verdict["difference"]

    at_once = fit(tiny_images, tiny_preset, tmp_path / "at once", baseline=True, seeds=2)
    for part in trained_parts(at_once):
        assert_same_weights(weights_of(run, part), weights_of(at_once, part))
    assert records(run, "verdict")[-1] == records(at_once, "verdict")[-1]


def test_a_network_without_its_result_is_scored_not_trained(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"kind": "verdict"' not in line]
    kept = [line for line in kept if not ('"kind": "result"' in line and "alone" in line)]
    (run / "metrics.jsonl").write_text("".join(kept))
    again = Stopper(never)
    fit(tiny_images, tiny_preset, run, baseline=True, listener=again)
    assert again.steps == []
    same_run(run, finished)


def test_the_same_images_and_teachers_by_other_paths_are_the_same_run(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = tmp_path / "first" / "teachers"
    shutil.copytree(finished / "teachers", teachers)
    given = [f"teachers.{name}.checkpoint=first/teachers/{name}" for name in ("conv", "inv")]
    monkeypatch.chdir(tmp_path)
    fit(os.path.relpath(tiny_images), tiny_preset, "run", overrides=[*given, *FAST])
    (tmp_path / "below").mkdir()
    monkeypatch.chdir("below")
    moved = [f"teachers.{name}.checkpoint=../first/teachers/{name}" for name in ("conv", "inv")]
    listener = Stopper(never)
    run = fit(tiny_images, tiny_preset, "../run", overrides=[*moved, *FAST], listener=listener)
    assert listener.steps == []
    assert not any(line.startswith("changed") for line in listener.said)
    assert records(run, "run")[-1]["changed"] == []
    for other in ("../first/teachers/inv", "../tiny.yaml", "nowhere"):
        moved[0] = f"teachers.conv.checkpoint={other}"
        with pytest.raises(
            UserError, match=rf"teachers\.conv\.checkpoint: ../first/teachers/conv -> {re.escape(other)}"
        ):
            fit(tiny_images, tiny_preset, "../run", overrides=[*moved, *FAST])


def test_a_run_finds_its_images_from_another_directory(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    shutil.copytree(tiny_images, here / "images")
    monkeypatch.chdir(here)
    run = here / fit("images", tiny_preset, "run", overrides=FAST)
    scored = evaluate_run(run)
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images", val=2)  # others of that name
    assert evaluate_run(run) == scored
    assert (build_cache(run, tmp_path / "cache", epochs=1) / "seed-0" / "cache.json").is_file()
    monkeypatch.undo()
    there = Path(shutil.move(here, tmp_path / "there"))  # all of it: what is relative is still right
    monkeypatch.chdir(there)
    assert evaluate_run(there / "run") == scored


# Refusals


def test_another_configuration_on_a_run_is_refused_and_the_keys_are_named(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = contents(run)
    with pytest.raises(UserError) as caught:
        fit(tiny_images, tiny_preset, run, overrides=["student.recipe.epochs=3", "augment.flip=false"])
    message = str(caught.value)
    assert "holds another run" in message
    assert "augment.flip: True -> False" in message
    assert "student.recipe.epochs: 2 -> 3" in message
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        fit(tiny_images, tiny_preset, run, seed=1)
    other_data = make_images(tmp_path / "other", 2, 1)
    with pytest.raises(UserError, match=r"data\.source: .*other"):
        fit(other_data, tiny_preset, run)
    assert contents(run) == before


def test_a_folder_of_something_else_is_refused_and_left_alone(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis' exists and is no run directory; choose another --out"):
        fit(tiny_images, tiny_preset, tmp_path / "thesis")
    assert contents(tmp_path / "thesis") == {"chapter.txt": b"years of work"}
    with pytest.raises(UserError, match="exists and is no run directory"):
        fit(tiny_images, tiny_preset, tmp_path / "thesis" / "chapter.txt")
    (tmp_path / "empty").mkdir()
    fit(tiny_images, tiny_preset, tmp_path / "empty", overrides=FAST)


def test_a_folder_of_something_else_is_that_whatever_its_links(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "link").symlink_to(tiny_images)
    with pytest.raises(UserError, match="own' exists and is no run directory"):
        fit(tiny_images, tiny_preset, tmp_path / "own")


@pytest.mark.parametrize(
    "override",
    ["student.model_kwargs.depth=0", "student.model_kwargs.patch_size=64"],  # the first when it is made for inference
)
def test_a_network_that_cannot_answer_is_refused_before_any_is_trained(
    override: str, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"model 'cit_micro_patch4_32' .* does not answer for images of 16 pixels: "):
        fit(tiny_images, tiny_preset, tmp_path / "run", overrides=[override])
    assert not (tmp_path / "run").exists()


def test_images_that_are_scored_and_trained_on_are_counted(tiny_preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    for name in ("0", "1"):
        shutil.copy(data / "train" / "red" / f"{name}.png", data / "val" / "blue" / f"{name}-again.png")
    dataset = scan(open_source(data, 0.2, 0), 16, in_memory=True)
    (line,) = (line for line in describe(dataset) if "training images too" in line)
    assert line.startswith(
        "2 of the 14 validation images are training images too, to the byte ('val/blue/0-again.png' is"
    )
    assert "'train/red/0.png'" in line


def test_a_run_that_stopped_before_it_began_can_be_started(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on nowhere")
    run = fit(tiny_images, tiny_preset, tmp_path / "run", overrides=FAST)
    assert trained_parts(run) == ALL_PARTS[:3]


def lay_out(root: Path, what: str) -> Path:
    if what == "missing":
        return root / "nothing here"
    if what == "no validation":
        shutil.rmtree(make_images(root, 2, 1) / "val")
    elif what == "class in one split":
        make_images(root, 2, 1)
        shutil.rmtree(root / "val" / "red")
    elif what == "one class":
        make_images(root, 2, 1, classes=["red"])
    elif what == "empty":
        root.mkdir()
    elif what == "a file":
        root.write_text("")
    elif what == "unreadable class":
        make_images(root, 2, 1)
        for path in (root / "train" / "red").iterdir():
            path.write_bytes(b"no image")
    return root


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "does not exist"),
        ("a file", "is a file"),
        ("empty", "holds no class folders"),
        ("no validation", "has train/ but none of val/"),
        ("class in one split", "'red' are in .*train"),
        ("one class", "holds one class, 'red'"),
        ("unreadable class", "class 'red' has no readable image to train on; first fault: .*red"),
    ],
)
def test_bad_data_is_said_and_nothing_is_written(what: str, message: str, tiny_preset: str, tmp_path: Path) -> None:
    data = lay_out(tmp_path / "data", what)
    with pytest.raises(UserError, match=message):
        fit(data, tiny_preset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.recipe.epoch=1"], r"unknown key 'student\.recipe\.epoch', did you mean 'epochs'\?"),
        (["student.recipe.epochs=0"], r"'student\.recipe\.epochs' is 0: .*greater than or equal to 1"),
        (["student.model=cit_micro_patch4_3"], "did you mean 'cit_micro_patch4_32'"),
        (["teachers.conv.model=resnet_smal"], "did you mean 'resnet_small'"),
        (["student.model_kwargs.embed_dim=25"], "model 'cit_micro_patch4_32' cannot be made with"),
        (["engine.tensorboard=true"], r"engine\.tensorboard=true needs TensorBoard; install coadvise\[tensorboard\]"),
        (["teachers.conv.checkpoint=nowhere"], "no model in 'nowhere'"),
        (
            ["teachers.conv.pretrained=true", *RESNET18],
            "has 1000 classes .*the data has 3",
        ),
        (["teachers.inv.pretrained=true"], "no published weights for 'rednet_small'"),
        (["student.recipe.accumulate=5"], "a batch of 12 images cannot be cut into 5 micro-batches"),
    ],
)
def test_a_bad_configuration_is_said_and_nothing_is_written(
    overrides: Sequence[str], message: str, tiny_images: Path, tiny_preset: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    monkeypatch.setattr(
        "coadvise.models.network.create_network", lambda about, source: create_network(about)
    )  # downloads nothing
    with pytest.raises(UserError, match=message):
        fit(tiny_images, tiny_preset, tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_tensorboard_where_it_is_installed_gets_every_number(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: Path) -> None:
            assert folder == tmp_path / "run" / "tensorboard"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

    stand_in = type(sys)("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    run = fit(tiny_images, tiny_preset, tmp_path / "run", overrides=["engine.tensorboard=true"])
    wanted = [
        (f"{r['part']}/{group}/{name}", value, r["step"])
        for r in records(run, "train", "eval")
        for group in ("losses", "top1")
        for name, value in r.get(group, {}).items()
    ]
    assert written == wanted


def test_a_run_in_use_is_refused(finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")

    class Second(Stopper):
        message = ""

        def progress(self, *_: Any) -> None:
            if not self.message:
                with pytest.raises(UserError) as caught:
                    fit(tiny_images, tiny_preset, run, baseline=True)
                self.message = str(caught.value)

    second = Second(never)
    fit(tiny_images, tiny_preset, run, baseline=True, seeds=2, listener=second)
    assert f"is in use by process {os.getpid()} on " in second.message


# Given teachers


@pytest.mark.parametrize(
    ("overrides", "answers"),
    [
        (["teachers.conv.token=class", "teachers.inv.token=class"], ["class"]),  # naive distillation
        (["teachers.conv.token=class", "teachers.inv.token=class", "student.combine=mean"], ["class"]),
        (["teachers.inv.token=conv"], ["class", "conv", "average"]),
        (["teachers.conv.token=[conv, class]", "teachers.inv.token=[class]"], ["class", "conv", "average"]),
        (["teachers.conv.hard=true"], ["class", "conv", "inv", "average"]),
        (["teachers.conv2.model=resnet_small"], ["class", "conv", "inv", "conv2", "average"]),
        (["student.model_kwargs.aligned={conv: conv}"], ["class", "conv", "inv", "average"]),
    ],
)
def test_teachers_advise_the_tokens_they_are_told_to(
    overrides: list[str], answers: list[str], tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = fit(tiny_images, tiny_preset, tmp_path / "run", overrides=overrides)
    teachers = list(parse_config(yaml.safe_load((run / "config.yaml").read_text())).teachers)
    assert list(records(run, "train")[-1]["losses"]) == ["total", "class", *teachers]
    assert list(records(run, "result")[-1]["top1"]) == answers


def test_teachers_of_one_architecture_differ(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    conv = load_config(tiny_preset).teachers["conv"].model_dump_json()
    run = fit(tiny_images, tiny_preset, tmp_path / "run", overrides=[f"teachers.inv={conv}"])
    one, two = (weights_of(run, f"teachers/{name}") for name in ("conv", "inv"))
    assert one.keys() == two.keys()
    assert_same_weights(one, weights_of(finished, "teachers/conv"))
    assert not torch.equal(one["stem.conv.weight"], two["stem.conv.weight"])


def test_a_teacher_of_another_run_advises_as_it_did_there(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    given = [f"teachers.{name}.checkpoint={finished / 'teachers' / name}" for name in ("conv", "inv")]
    listener = Stopper(never)
    run = fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, overrides=given, listener=listener)
    assert trained(listener) == ALL_PARTS[2:]
    for part in ALL_PARTS:
        assert_same_weights(weights_of(run, part), weights_of(finished, part))
    assert records(run, "result") == records(finished, "result")


def test_a_given_teacher_of_more_classes_answers_for_the_data_s(
    finished: Path, tiny_preset: str, tmp_path: Path
) -> None:
    data = make_images(tmp_path / "data", classes=("green", "red"))  # the second and third of the teacher's three
    listener, given_teacher = Stopper(never), f"teachers.conv.checkpoint={finished / 'teachers/conv'}"
    run = fit(data, tiny_preset, tmp_path / "run", overrides=[given_teacher], listener=listener)
    assert "conv teacher: of the 3 classes it knows it answers for the 2 of the data" in listener.said
    logits, labels = load_predictions(run, "teachers/conv")
    network = load_network(finished / "teachers/conv")
    config = load_config(tiny_preset)
    dataset = scan(open_source(str(data), 0.2, 0), 16, in_memory=True)
    expected = predict_logits(network, dataset.val, 16, Engine(config.engine))["class"][:, 1:]
    torch.testing.assert_close(logits["class"], expected)
    result = next(record for record in records(run, "result") if record["part"] == "teachers/conv")
    assert result["top1"]["class"] == (expected.argmax(-1) == labels).double().mean().item()
    assert evaluate_run(run)["parts"]["teachers/conv"]["class"]["top1"] == result["top1"]["class"]


def test_a_given_teacher_of_other_classes_is_refused(finished: Path, tiny_preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", 2, 1, classes=("blue", "green", "yellow"))
    with pytest.raises(UserError, match=r"teacher 'conv' has 3 classes \(blue, green, red\), the data has 3"):
        fit(
            data,
            tiny_preset,
            tmp_path / "run",
            overrides=[f"teachers.conv.checkpoint={finished / 'teachers' / 'conv'}"],
        )
    assert not (tmp_path / "run").exists()


def test_a_given_teacher_of_another_image_size_is_refused_where_it_must_be(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    given = [f"teachers.conv.checkpoint={finished / 'students' / 'alone-0'}", "data.image_size=32", *FAST]
    with pytest.raises(UserError, match=r"takes images of 16 pixels only, data\.image_size is 32"):
        fit(tiny_images, tiny_preset, tmp_path / "run", overrides=given)
    assert not (tmp_path / "run").exists()
    given[0] = f"teachers.conv.checkpoint={finished / 'teachers' / 'conv'}"
    fit(tiny_images, tiny_preset, tmp_path / "run", overrides=given)


# Unreadable images


def test_an_unreadable_training_image_is_named_and_left_out(tiny_preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    bad = data / "train" / "green" / "3.png"
    bad.write_bytes(bad.read_bytes()[:40])
    listener = Stopper(never)
    run = fit(data, tiny_preset, tmp_path / "run", overrides=["student.recipe.batch_size=23", *FAST], listener=listener)
    assert any("cannot be read" in text and "'train/green/3.png'" in text for text in listener.said)
    assert "train: 23 images, 7 to 8 a class, 16x16 pixels" in listener.said
    splits = json.loads((run / "data.json").read_text())["splits"]
    assert splits["train"]["images"] == 23
    assert "'train/green/3.png'" in splits["train"]["unreadable"][0]
    assert (run / "report.html").is_file()


# Presets


# For networks of the paper's size, which take long to build and to write, shallow ones of the same family.
SHALLOW = {
    "rednet101": "model_kwargs={depths: [1, 1, 1, 1]}",
    "regnety_040": "model=regnety_002",
    "cit_small_aligned_patch16_224": "model_kwargs.depth=2",
}


def shrunk(preset: str) -> list[str]:
    """One step an epoch, two epochs; augmentation is the preset's own, models as well but for the largest."""
    config = load_config(preset)
    large = config.data.image_size > 96
    networks = {**{f"teachers.{name}": teacher for name, teacher in config.teachers.items()}, "student": config.student}
    shallow = {where: SHALLOW.get(network.model.partition(".")[0]) for where, network in networks.items()}
    changes = {"epochs": 2, "batch_size": 2 if large else 6, "warmup_epochs": 1, "evaluations": 1, "accumulate": 1}
    return [
        *(f"{where}.recipe.{key}={value}" for where in networks for key, value in changes.items()),
        *(f"{where}.{change}" for where, change in shallow.items() if change),
        *(f"teachers.{name}.pretrained=false" for name in config.teachers),
        f"data.classes=[{', '.join(config.data.classes[:2])}]",
        "data.workers=0",
        "engine.device=cpu",
    ]


def test_the_default_preset_follows_the_images_size(tmp_path: Path) -> None:
    assert default_preset("digits") == "digits"
    assert default_preset(make_images(tmp_path / "small", 1, 1, size=64)) == "small-images"
    assert default_preset(make_images(tmp_path / "large", 1, 1, size=128)) == "photos"
    assert {"digits", "small-images", "photos"} <= set(preset_names())


class SaidError(Exception):
    pass


class FirstWord(Silent):
    def say(self, text: str) -> None:
        raise SaidError(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_the_preset_that_is_made_for_one_is_not_chosen_in_silence(tmp_path: Path) -> None:
    images = make_images(tmp_path / "large", 12, 2, size=128)
    with pytest.raises(SaidError, match=r"no GPU here.*--dry-run"):
        fit(images, out=tmp_path / "run", listener=FirstWord())
    with pytest.raises(SaidError, match="presizing"):
        fit(images, preset="photos", out=tmp_path / "run", listener=FirstWord())


def test_a_dry_run_names_each_network_with_its_time_and_writes_nothing(tiny_images: Path, tmp_path: Path) -> None:
    what = (tiny_images, write_preset(tmp_path), tmp_path / "run")
    foreseen = list(foresee_fit(*what, baseline=True, seeds=2))
    assert [network for network, _ in foreseen] == [part.title for part in plan(load_config(what[1]), 2, True)]
    assert all(seconds > 0 for _, seconds in foreseen)
    assert not (tmp_path / "run").exists()
    fit(*what)
    done = {network for network, seconds in foresee_fit(*what, baseline=True) if seconds == 0}
    assert done == {"conv teacher", "involution teacher", "student co-advised (seed 0)"}


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_trains_two_steps_of_each_network_and_goes_on(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly = partial(conclude_module.images_per_second, batch_size=1, repeats=1)
    monkeypatch.setattr(conclude_module, "images_per_second", quickly)
    config = load_config(preset)
    large = config.data.image_size > 96
    classes = config.data.classes[:2] or CLASSES[:2]
    data = make_images(tmp_path / "data", 1 if large else 3, 1, size=24, classes=classes)
    run, overrides = tmp_path / "run", shrunk(preset)
    parts = [part.name for part in plan(config, 1, False)]
    for part in parts:
        stopper = Stopper(lambda p, step: step == 1)
        with pytest.raises(Interrupted, match=f"stopped at step 1 of 2 of {part}"):
            fit(data, preset, run, overrides=overrides, listener=stopper)
    last = Stopper(never)
    fit(data, preset, run, overrides=overrides, listener=last)
    assert last.steps == [(parts[-1], 2)]
    assert trained_parts(run) == parts
    assert [(r["part"], r["step"]) for r in records(run, "train")] == [(part, n) for part in parts for n in (1, 2)]
    losses = [value for r in records(run, "train") for value in r["losses"].values()]
    assert np.isfinite(losses).all()
    assert set(records(run, "result")[-1]["top1"]) == {"class", "average", *config.teachers}


# Real processes


SLOW = ["teachers.conv.recipe.epochs=400", "student.recipe.ema=0.9"]


def started(data: Path, preset: str, run: Path, steps: int) -> "subprocess.Popen[str]":
    """`python -m coadvise fit`, waited for until it has trained a while."""
    process = subprocess.Popen(
        command("fit", data, *SLOW, "--preset", preset, "--out", run),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or len(records(run, "train")) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not get going"
        time.sleep(0.02)
    return process


def test_killed_or_stopped_the_same_command_completes_the_run(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = started(tiny_images, tiny_preset, run, 3)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = started(tiny_images, tiny_preset, run, len(records(run, "train")) + 3)
    process.terminate()
    out, err = process.communicate(timeout=600)
    assert process.returncode == Interrupted.exit_code == 75
    assert "going on from step" in out, "the lock of the killed program is free and its checkpoint is found"
    assert err.startswith("coadvise: stopped at step ")
    assert err.endswith("of teachers/conv; run the same command again to go on\n")
    assert len(err.splitlines()) == 1

    undisturbed = fit(tiny_images, tiny_preset, tmp_path / "undisturbed", overrides=SLOW)
    rest = Stopper(never)
    fit(tiny_images, tiny_preset, run, overrides=SLOW, listener=rest)
    assert rest.steps[0][1] > 6
    same_run(run, undisturbed)


TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Without batch norm, whose figures are a process's own, two processes compute what one does.
NO_BATCH_NORM = PRESET.replace("resnet_small", "vit_tiny_patch16_224").replace("rednet_small", "vit_tiny_patch16_224")


def test_two_processes_train_as_one_does(tiny_images: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(NO_BATCH_NORM)
    for teacher in values["teachers"].values():
        teacher["model_kwargs"] = {"patch_size": 4, "embed_dim": 24, "depth": 1}
        teacher["recipe"]["accumulate"] = 2
    preset = write_preset(tmp_path, yaml.safe_dump(values))
    one = fit(tiny_images, preset, tmp_path / "one", baseline=True)
    arguments = ["fit", tiny_images, "--preset", preset, "--out", tmp_path / "two", "--baseline"]
    done = run_program(*arguments, launcher=TWO_PROCESSES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    assert [r["kind"] for r in records(two)] == [r["kind"] for r in records(one)]
    assert records(two, "run")[0]["processes"] == 2
    assert done.stdout.count("conv teacher: top-1") == 1, "one process speaks"
    for got, wanted in zip(records(two, "train"), records(one, "train"), strict=True):
        assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-3, abs=1e-5)
        assert (got["part"], got["step"]) == (wanted["part"], wanted["step"])
    images = [np.random.default_rng(n).integers(0, 255, (16, 16, 3), dtype=np.uint8) for n in range(4)]
    for got, wanted in zip(load(two).predict(images), load(one).predict(images), strict=True):
        assert got.probabilities == pytest.approx(wanted.probabilities, abs=0.01)
