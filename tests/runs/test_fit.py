import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import (
    CLASSES,
    ONE_EPOCH,
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
from coadvise.config.reading import load_config, parse_config, preset_names
from coadvise.config.schema import EngineConfig
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.errors import Interrupted, UserError
from coadvise.evaluation.calibration import calibrated_errors, fit_temperatures
from coadvise.evaluation.scores import load_predictions, log_probabilities, predict_logits
from coadvise.evaluation.tables import score_lines
from coadvise.models.network import create_network, load_network
from coadvise.runs.evaluate import evaluate_run
from coadvise.runs.fit import describe, estimate_fit
from coadvise.runs.options import FitOptions
from coadvise.runs.plan import ADVISED, ALONE, Part, plan_fit, run_parts
from coadvise.runs.run import trained_parts
from coadvise.training.engine import Engine

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
    results = {r["part"]: r for r in records(finished, "result")}
    assert list(results) == ALL_PARTS
    assert set(results["students/advised-0"]["top1"]) == {"class", "conv", "inv", "average"}
    assert set(results["students/alone-0"]["top1"]) == {"class"}
    assert records(finished, "verdict")[-1]["images"] == 12
    data = json.loads((finished / "data.json").read_text())
    assert data["classes"] == list(CLASSES)
    assert data["splits"]["train"]["images"] == 24
    assert data["splits"]["val"]["per_class"] == [4, 4, 4]


def test_a_run_keeps_the_precision_that_its_machine_chose(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = partial(fit, tiny_images, tiny_preset, overrides=["engine.precision=auto", "engine.device=cpu"])
    monkeypatch.setattr("coadvise.training.engine._cpu_has_bfloat16", lambda: True)
    with pytest.raises(Interrupted):
        asked(tmp_path / "run", listener=Stopper(lambda part, step: True))
    assert load_config(str(tmp_path / "run" / "config.yaml")).engine.precision == "bfloat16"
    monkeypatch.setattr("coadvise.training.engine._cpu_has_bfloat16", lambda: False)
    with pytest.raises(UserError, match=r"engine\.precision: bfloat16 -> float32"):
        asked(tmp_path / "run")


# Advised and alone


def test_advised_and_alone_start_from_the_same_weights_and_see_the_same_views(
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


def test_a_student_alone_keeps_the_initial_heads_of_its_tokens(finished: Path) -> None:
    config = parse_config(yaml.safe_load((finished / "config.yaml").read_text()))
    before = job_module.initial_network(Part("students/alone-0", ALONE, 0), config, CLASSES).model.state_dict()
    alone, advised = weights_of(finished, "students/alone-0"), weights_of(finished, "students/advised-0")
    assert job_module.initial_network(Part("x", ADVISED, 0), config, CLASSES).model.head_conv.weight.requires_grad
    for head in ("head_conv.weight", "head_inv.weight"):
        assert torch.equal(alone[head], before[head])
        assert not torch.equal(advised[head], before[head])
    assert not torch.equal(alone["head.weight"], before["head.weight"])


# Continuing


def test_a_run_can_be_stopped_in_any_network(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    """After its last step, too: then the next network stops."""
    config, steps = str(finished / "config.yaml"), list[tuple[str, int]]()
    torch.manual_seed(99)  # global generators have no effect
    np.random.seed(99)
    stops = [(ALL_PARTS[0], 1), (ALL_PARTS[0], 4), (ALL_PARTS[1], 2), (ALL_PARTS[2], 3), (ALL_PARTS[3], 1)]
    for part, step in stops:
        stopper = Stopper(lambda p, s, at=(part, step): (p, s) == at)
        with pytest.raises(Interrupted, match=part if step < 4 else "step 1 of 4 of teachers/inv"):
            fit(tiny_images, config, tmp_path / "run", baseline=True, listener=stopper)
        steps += stopper.steps
    rest = Stopper(never)
    fit(tiny_images, config, tmp_path / "run", baseline=True, listener=rest)
    assert steps + rest.steps == [(p, s) for p in ALL_PARTS for s in (1, 2, 3, 4)]
    same_run(tmp_path / "run", finished)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == (finished / "config.yaml").read_bytes()


def test_a_finished_run_is_not_trained_again(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    files = {name: data for name, data in contents(run).items() if name.startswith(("teachers", "students", "pred"))}
    again = Stopper(never)
    fit(tiny_images, tiny_preset, run, baseline=True, listener=again)
    assert again.steps == []
    assert sum(text.endswith("done already") for text in again.said) == 4
    assert {n: d for n, d in contents(run).items() if n.startswith(("teachers", "students", "pred"))} == files
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"verdict"' not in line and not ('"result"' in line and "alone" in line)]
    (run / "metrics.jsonl").write_text("".join(kept))
    fit(tiny_images, tiny_preset, run, baseline=True, listener=again)
    assert again.steps == [], "a network without its result is scored, not trained"
    same_run(run, finished)


def test_a_baseline_and_seeds_are_added_to_a_finished_run(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Stopper(never)
    fit(tiny_images, tiny_preset, run, listener=first)
    assert trained(first) == ALL_PARTS[:3]
    assert "--baseline" in records(run, "verdict")[-1]["sentence"]
    second = Stopper(never)
    fit(tiny_images, tiny_preset, run, baseline=True, listener=second)
    assert trained(second) == ["students/alone-0"]
    assert records(run, "verdict")[-1]["difference"]["seeds"] is None
    third = Stopper(never)
    fit(tiny_images, tiny_preset, run, baseline=True, seeds=2, listener=third)
    assert trained(third) == ["students/advised-1", "students/alone-1"]
    verdict = records(run, "verdict")[-1]
    assert verdict["seeds"] == [0, 1]
    assert verdict["difference"]["seeds"]["n"] == 2
    tops = {record["part"]: record["top1"] for record in records(run, "result")}
    for row in verdict["rows"]:
        if row["name"].startswith("student"):
            role = "advised" if "co-advised" in row["name"] else "alone"
            seeds = [tops[f"students/{role}-{n}"][row["answer"]] for n in (0, 1)]
            assert (row["top1"], row["spread"]) == pytest.approx((np.mean(seeds), np.std(seeds, ddof=1)))
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
    assert verdict == records(at_once, "verdict")[-1]


def test_the_same_images_and_teachers_by_other_paths_are_the_same_run(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And given teachers advise as they did in their own run."""
    shutil.copytree(finished / "teachers", tmp_path / "first" / "teachers")
    given = [f"teachers.{name}.start=first/teachers/{name}" for name in ("conv", "inv")]
    monkeypatch.chdir(tmp_path)
    listener = Stopper(never)
    run = tmp_path / fit(os.path.relpath(tiny_images), tiny_preset, seed=0, overrides=given, listener=listener)
    assert run == tmp_path / "runs" / f"{tiny_images.name}-tiny-seed0"
    assert trained(listener) == ALL_PARTS[2:3]
    for part in ALL_PARTS[:3]:
        assert_same_weights(weights_of(run, part), weights_of(finished, part))
    (tmp_path / "below").mkdir()
    monkeypatch.chdir("below")
    moved = [f"teachers.{name}.start=../first/teachers/{name}" for name in ("conv", "inv")]
    listener = Stopper(never)
    fit(tiny_images, tiny_preset, run, overrides=moved, listener=listener)
    assert listener.steps == []
    moved[0] = "teachers.conv.start=../first/teachers/inv"
    with pytest.raises(UserError, match=r"teachers\.conv\.start: .* -> \.\./first/teachers/inv"):
        fit(tiny_images, tiny_preset, run, overrides=moved)


def test_a_run_finds_its_images_from_another_directory(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    shutil.copytree(tiny_images, here / "images")
    monkeypatch.chdir(here)
    run = here / fit("images", tiny_preset, "run", overrides=ONE_EPOCH)
    scored = evaluate_run(run)
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images", val=2)  # others of that name
    assert evaluate_run(run) == scored
    assert (build_cache(run, tmp_path / "cache", epochs=1) / "seed-0" / "cache.json").is_file()


# Refusals


def test_bad_data_is_named_and_nothing_is_written(tiny_preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", 2, 1)
    for path in (data / "train" / "red").iterdir():
        path.write_bytes(b"no image")
    for folder, names in ((tmp_path / "nothing", "nothing"), (data, "'red'")):
        with pytest.raises(UserError, match=names):
            fit(folder, tiny_preset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bad_configuration_is_named_and_nothing_is_written(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.training.trackers.find_spec", lambda name: None)  # as if nothing were installed
    monkeypatch.setattr("coadvise.models.network.create_network", lambda about, source=None: create_network(about))
    for overrides, names in (
        (["student.model=cit_micro_patch4_3"], "'cit_micro_patch4_32'"),
        (["student.model=resnet18"], "'resnet18' .*cit_tiny_patch16_224"),
        (["teachers.conv.model=resnet_smal"], "'resnet_small'"),
        (["student.model_kwargs.embed_dim=25"], "'cit_micro_patch4_32'"),
        (["student.model_kwargs.patch_size=64"], "'cit_micro_patch4_32' .*16 pixels"),
        (["engine.trackers=[wandb]"], r"wandb is not installed; pip install 'coadvise\[wandb\]'"),
        (["engine.trackers=[wandbs]"], "engine.trackers.0' is 'wandbs'"),
        (["teachers.conv.start=./nowhere"], "'nowhere'"),
        (["teachers.conv.start=resnet18", "teachers.conv.adapt=none"], "1000 classes .*3"),
        (["teachers.inv.start=rednet_small"], "'rednet_small'"),
        (["student.recipe.accumulate=5"], "12 images .*5 micro-batches"),
        ([f"teachers.conv.start={finished}/students/alone-0", "data.image_size=32"], "16 pixels .*32"),
    ):
        with pytest.raises(UserError, match=names):
            fit(tiny_images, tiny_preset, tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_a_run_refuses(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    def asked(**options: Any) -> None:
        options = {"data": tiny_images, "preset": tiny_preset, "out": tmp_path / "run", **options}
        estimate_fit(plan_fit(FitOptions.of(**options)), lambda line: None, lambda part, seconds: None)

    for options, said in (
        ({"out": finished, "overrides": ["student.recipe.epochs=9"]}, "holds another run"),
        ({"overrides": ["teachers.conv.start=nowhere/at/all"]}, "nowhere"),
        ({"overrides": ["data.balance=loss", "data.class_weights={purple: 2}"]}, "purple"),
        ({"reuse": tmp_path}, "give --reuse the folder of a run"),
    ):
        with pytest.raises(UserError, match=said):
            asked(**options)


def test_a_command_with_fewer_options_still_reports_what_is_there(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    fit(tiny_images, tiny_preset, run)
    before, after = (records(folder, "verdict")[-1] for folder in (finished, run))
    assert (after["sentence"], len(after["rows"])) == (before["sentence"], len(before["rows"]))


def test_what_is_wrong_with_the_data_is_said_in_two_lines(tmp_path: Path) -> None:
    images = make_images(tmp_path, train=9, val=2)
    usual = [*describe(scan(open_source(images), 16, in_memory=False))]
    assert [line.partition(":")[0] for line in usual] == ["data", "split", "train", "validation"]
    for number in range(2, 9):
        (images / "train" / "red" / f"{number}.png").unlink()
    for number in range(4):
        (images / "train" / "blue" / f"{number}.png").write_bytes(b"broken")
    shutil.copy(images / "train" / "green" / "0.png", images / "val" / "green" / "0.png")
    shutil.copy(images / "train" / "red" / "0.png", images / "train" / "green" / "1.png")
    files, classes = [*describe(scan(open_source(images), 16, in_memory=False))][4:]
    assert files.startswith("files: 4 file(s) cannot be read and are left out ('train/blue/0.png'")
    assert "and 1 more in data.json); 1 of" in files, "no scored one"
    assert "1 of the 6 validation images are also training images" in files
    assert "1 image(s) have two labels" in files
    assert classes.startswith("classes are of unequal size: 'green' has 9 training images, 'red' 2")


def test_with_three_splits_curves_are_of_val_and_the_verdict_of_test(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(tiny_images, tmp_path / "images"))
    for name in CLASSES:  # other pictures than val's, and fewer
        shutil.copytree(images / "train" / name, images / "test" / name)
        for number in range(1, 8):
            (images / "test" / name / f"{number}.png").unlink()
    listener = Stopper(never)
    run = fit(images, preset=tiny_preset, out=tmp_path / "run", baseline=True, listener=listener)
    plain = fit(tiny_images, preset=tiny_preset, out=tmp_path / "plain", baseline=True)
    assert records(run, "eval") == records(plain, "eval")
    _, labels = load_predictions(run, "students/advised-0")
    assert len(labels) == records(run, "verdict")[-1]["images"] == 3
    assert any(line.startswith("test: 3 images") for line in listener.said)
    assert any("3 of the 3 test images are also training images" in line for line in listener.said)
    assert "3 test images" in (run / "report.html").read_text()
    scored = evaluate_run(run)
    assert (scored["images"], scored["data"]) == (3, f"{images} (test)")
    written = json.loads((run / "data.json").read_text())["splits"]
    assert [*written] == ["train", "val", "test"]
    assert written["test"]["paths"] == [f"test/{name}/0.png" for name in sorted(CLASSES)]
    _check_calibration(run, plain, images, tiny_preset, tmp_path / "again")
    shutil.copy(images / "train" / "red" / "5.png", images / "test" / "blue" / "0.png")
    with pytest.raises(UserError, match=r"test images: 1 replaced"):
        fit(images, preset=tiny_preset, out=run, baseline=True)


def _check_calibration(run: Path, plain: Path, images: Path, preset: str, again: Path) -> None:
    """Temperatures are fitted on val, change no weight and no top-1, and all commands agree on them."""
    scored = evaluate_run(run)["parts"]
    for result, without in zip(records(run, "result"), records(plain, "result"), strict=True):
        part = result["part"]
        assert contents(run / part)["model.safetensors"] == contents(plain / part)["model.safetensors"]
        assert result.keys() - without.keys() == {"temperature", "calibrated_ece"}
        network, (on_val, labels) = load(run, part), load_predictions(plain, part)
        assert load(plain, part).network.temperatures == {}
        assert network.network.temperatures == result["temperature"] == fit_temperatures(on_val, labels)
        (logits, labels), paths = load_predictions(run, part), sorted((images / "test").rglob("*.png"))
        assert result["calibrated_ece"] == calibrated_errors(logits, labels, result["temperature"])
        for answer, values in log_probabilities(logits).items():
            assert scored[part][answer]["temperature"] == result["temperature"][answer]
            assert scored[part][answer]["calibrated_ece"] == pytest.approx(result["calibrated_ece"][answer], abs=1e-6)
            wanted = (values / result["temperature"][answer]).softmax(-1)
            found = network.predict(paths, answer)
            assert [list(p.probabilities.values()) for p in found] == [
                pytest.approx(r, abs=1e-5) for r in wanted.tolist()
            ]
    assert any("ECE at T" in line for line in score_lines(evaluate_run(run)))
    assert not any("ECE at T" in line for line in score_lines(evaluate_run(plain)))
    assert "with temperature" in (run / "report.html").read_text()
    assert "with temperature" not in (plain / "report.html").read_text()
    fit(images, preset=preset, out=again, baseline=True, reuse=run)
    assert records(again, "result") == records(run, "result")
    shutil.rmtree(again / "predictions")  # scored again, the weights are there
    fit(images, preset=preset, out=again, baseline=True)
    assert records(again, "result")[-4:] == records(run, "result")
    assert load(again).network.temperatures == load(run).network.temperatures


@pytest.mark.parametrize("balance", ["loss", "sampler"])
def test_rare_classes_can_count_more(balance: str, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    """Teachers' and students' alike; a stopped run goes on to the same numbers."""
    images = Path(shutil.copytree(tiny_images, tmp_path / "images"))
    for number in range(2, 8):
        (images / "train" / "red" / f"{number}.png").unlink()
    common: dict[str, Any] = {"preset": tiny_preset, "baseline": True, "overrides": [f"data.balance={balance}"]}
    run = fit(images, out=tmp_path / "run", **common)
    plain = fit(images, preset=tiny_preset, baseline=True, out=tmp_path / "plain")
    for part in ALL_PARTS:
        losses = [
            [record["losses"]["class"] for record in records(folder, "train") if record["part"] == part]
            for folder in (run, plain)
        ]
        assert losses[0] != losses[1]
    assert "By macro accuracy" in records(run, "verdict")[-1]["sentence"]
    with pytest.raises(Interrupted):
        fit(images, out=tmp_path / "again", listener=Stopper(lambda *at: at == ("students/advised-0", 2)), **common)
    same_run(fit(images, out=tmp_path / "again", **common), run)
    for more, says in (
        ({"overrides": ["data.balance=loss", "data.class_weights={rd: 2}"]}, "'rd', did you mean 'red'"),
        (
            {"overrides": ["data.balance=sampler"], "cache": tmp_path / "cache"},
            "data.balance=sampler.*data.balance=loss",
        ),
    ):
        with pytest.raises(UserError, match=says):
            fit(images, out=tmp_path / "new", **{**common, **more})
    assert not (tmp_path / "new").exists()


def test_a_folder_with_other_contents_is_left_alone(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link").symlink_to(tiny_images)
    before = contents(tmp_path)
    for name in ("thesis", "thesis/chapter.txt", "links"):
        with pytest.raises(UserError, match=f"{name}' exists and is no run directory"):
            fit(tiny_images, tiny_preset, tmp_path / name)
    assert contents(tmp_path) == before


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
    assert f"process {os.getpid()} on " in second.message


# Given teachers


def test_teachers_advise_the_tokens_of_the_configuration(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    third = "teachers.conv2={model: resnet_small, hard: true, recipe: {epochs: 1, batch_size: 12}}"
    tokens = ["teachers.conv.token=[conv, class]", "teachers.inv.token=class"]
    run = fit(tiny_images, tiny_preset, tmp_path / "run", overrides=[*ONE_EPOCH, third, *tokens])
    assert list(records(run, "train")[-1]["losses"]) == ["total", "class", "conv", "inv", "conv2"]
    assert list(records(run, "result")[-1]["top1"]) == ["class", "conv", "conv2", "average"]


def test_a_given_teacher_of_more_classes_is_cut_to_those_of_the_data(
    finished: Path, tiny_preset: str, tmp_path: Path
) -> None:
    data = make_images(tmp_path / "data", classes=("green", "red"))  # the second and third of the teacher's three
    given_teacher = f"teachers.conv.start={finished / 'teachers/conv'}"
    run = fit(data, tiny_preset, tmp_path / "run", overrides=[given_teacher, *ONE_EPOCH])
    logits, labels = load_predictions(run, "teachers/conv")
    dataset = scan(open_source(str(data)), 16, in_memory=True)
    network = load_network(finished / "teachers/conv")
    expected = predict_logits(network, dataset.val, 16, Engine(EngineConfig(device="cpu")))["class"][:, 1:]
    torch.testing.assert_close(logits["class"], expected)
    result = next(record for record in records(run, "result") if record["part"] == "teachers/conv")
    assert result["top1"]["class"] == (expected.argmax(-1) == labels).double().mean().item()
    assert evaluate_run(run)["parts"]["teachers/conv"]["class"]["top1"] == result["top1"]["class"]


# Presets


# For networks of the paper's size, which take long to build and to write, shallow ones of the same family.
SHALLOW = {
    "rednet101": "model_kwargs={depths: [1, 1, 1, 1]}",
    "regnety_040": "model=regnety_002",
    "cit_small_aligned_patch16_224": "model_kwargs.depth=2",
    "resnet50": "model=test_resnet",
    "tf_efficientnet_lite0": "model=test_efficientnet",
    "vit_small_patch16_224": "model_kwargs.depth=2",
    "deit_tiny_patch16_224": "model_kwargs.depth=2",
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
        *(f"{where}.start=null" for where in networks),  # no weights are at hand
        *(f"teachers.{name}.adapt=null" for name in config.teachers),
        f"data.classes=[{', '.join(config.data.classes[:2])}]",
        "data.workers=0",
        "engine.device=cpu",
    ]


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_trains_two_steps_of_each_network_and_continues(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly = partial(conclude_module.images_per_second, batch_size=1, repeats=1)
    monkeypatch.setattr(conclude_module, "images_per_second", quickly)
    config = load_config(preset)
    large = config.data.image_size > 96
    classes = config.data.classes[:2] or CLASSES[:2]
    data = make_images(tmp_path / "data", 1 if large else 3, 1, size=24, classes=classes)
    run, overrides = tmp_path / "run", shrunk(preset)
    parts = [part.name for part in run_parts(config, 1, False)]
    stopper = Stopper(lambda p, step: (p, step) == (parts[-1], 1))
    with pytest.raises(Interrupted, match=f"stopped at step 1 of 2 of {parts[-1]}"):
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


SLOW = ["teachers.conv.recipe.epochs=150", "student.recipe.ema=0.9"]


def started(data: Path, preset: str, run: Path, steps: int) -> "subprocess.Popen[str]":
    """`python -m coadvise fit`, waited for until it has trained a while."""
    process = subprocess.Popen(
        command("fit", data, *SLOW, "--preset", preset, "--out", run),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
    assert "step" in out, "the lock of the killed program is free and its checkpoint is found"
    assert err.startswith("coadvise: stopped at step ")
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
    one = fit(tiny_images, preset, tmp_path / "one")
    arguments = ["fit", tiny_images, "--preset", preset, "--out", tmp_path / "two"]
    done = run_program(*arguments, launcher=TWO_PROCESSES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    assert [r["kind"] for r in records(two)] == [r["kind"] for r in records(one)]
    assert records(two, "run")[0]["processes"] == 2
    assert done.stdout.count("conv teacher: top-1") == 1, "one process talks"
    for got, wanted in zip(records(two, "train"), records(one, "train"), strict=True):
        assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-3, abs=1e-5)
        assert (got["part"], got["step"]) == (wanted["part"], wanted["step"])
    images = [np.random.default_rng(n).integers(0, 255, (16, 16, 3), dtype=np.uint8) for n in range(4)]
    for got, wanted in zip(load(two).predict(images), load(one).predict(images), strict=True):
        assert got.probabilities == pytest.approx(wanted.probabilities, abs=0.01)
