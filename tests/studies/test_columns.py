"""Each column of a study's table is what its own module says of the same network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from studied import Studied
from tiny import CLASSES

from coadvise.config import EngineConfig, load_config
from coadvise.errors import UserError
from coadvise.evaluation.agreement import agreement, divergences
from coadvise.evaluation.scores import load_predictions, save_predictions
from coadvise.models.network import load_network
from coadvise.runs.evaluate import evaluate_run
from coadvise.runs.plan import ADVISED, ALONE, TEACHER, Part
from coadvise.studies import STUDIES
from coadvise.studies.columns import ABOVE_ALONE, IMAGES, SEVERITIES, Column
from coadvise.studies.measures import Finished, check_shift, measure
from coadvise.training.engine import Engine
from coadvise.training.listener import Silent


def figures(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row["figures"] for row in result["rows"]}


def runs(result: dict[str, Any]) -> dict[str, Path]:
    return {row["name"]: Path(row["run"]) for row in result["rows"]}


def measured(column: Column, rows: list[Finished]) -> list[dict[int, Any]]:
    return measure(column, rows, Engine(EngineConfig(device="cpu")), Silent())


def test_kl_is_agreement_s(studied: Studied) -> None:
    result, _ = studied.run("divergence", 2)
    run = runs(result)["inv token"]
    for seed in (0, 1):
        parts = ("teachers/conv", "teachers/inv", f"students/advised-{seed}")
        wanted = {(d.answer, d.teacher): d.kl for d in divergences({p: load_predictions(run, p)[0] for p in parts})}
        rows = {"class token": "class", "conv token": "conv", "inv token": "inv", "average": "average"}
        for name, answer in rows.items():
            got = [figures(result)[name][f"kl_{teacher}"]["seeds"][str(seed)] for teacher in ("conv", "inv")]
            assert got == [wanted[answer, "conv"], wanted[answer, "inv"]]
    order = result["orders"][0]
    conv = [figures(result)[f"{row} token"]["kl_conv"]["mean"] for row in ("inv", "conv")]
    for over in ("images", "seeds"):
        assert order["over"][over]["mean"] == pytest.approx(conv[0] - conv[1])
        assert order["over"][over]["low"] < order["over"][over]["mean"] < order["over"][over]["high"]


def test_corruption_error_is_that_of_evaluate_and_is_kept(studied: Studied) -> None:
    result, _ = studied.run("shift")
    run = runs(result)["co-advised, inv token"]
    found = evaluate_run(run, corruptions=True, severities=SEVERITIES, images=IMAGES)["corruptions"]["parts"]
    for name, answer in (("co-advised, inv token", "inv"), ("co-advised, average", "average")):
        wanted = found["students/advised-0"][answer]["mean_corruption_error"]
        assert figures(result)[name]["corruption_error"]["seeds"]["0"] == wanted
    kept = max((studied.out / "scores").glob(f"{run.name}-*.json"), key=lambda path: path.stat().st_mtime_ns)
    written = kept.stat().st_mtime_ns
    assert figures(studied.run("shift")[0]) == figures(result)
    assert kept.stat().st_mtime_ns == written
    kept.write_text("{")  # damaged
    assert figures(studied.run("shift")[0]) == figures(result)
    assert json.loads(kept.read_text())["request"]["images"] == IMAGES


def test_parameters_and_speed_are_the_model_s(studied: Studied) -> None:
    result, _ = studied.run("architectures", 2)
    for row in STUDIES["architectures"].rows:
        part = f"teachers/{row.teachers[0]}" if row.role == TEACHER else f"students/{row.role}-0"  # type: ignore[index]
        network = load_network(runs(result)[row.name] / part)
        found = figures(result)[row.name]
        assert found["parameters"]["seeds"] == {"0": sum(p.numel() for p in network.model.parameters())}
        assert found["images_per_second"]["mean"] > 0
        assert found["images_per_second"]["spread"] is None


def test_a_teacher_s_accuracy_is_that_of_the_row_s_teacher(studied: Studied) -> None:
    result, _ = studied.run("capacity")
    for name, run in runs(result).items():
        logits, labels = load_predictions(run, f"teachers/{name[:4].strip()}")
        wanted = (logits["class"].argmax(-1) == labels).double().mean().item()
        found = figures(result)[name]
        assert found["teacher_top1"]["mean"] == pytest.approx(wanted)
        assert found["above_teacher"]["mean"] == pytest.approx(found["top1"]["mean"] - wanted)
    assert all(order["over"]["images"] is not None for order in result["orders"])


def test_what_advice_is_worth_is_over_the_same_model_alone(studied: Studied) -> None:
    result, _ = studied.run("students")
    found = figures(result)
    for name, figure in found.items():
        alone = found[f"{name.partition(',')[0]}, alone"]
        assert figure["above_alone"]["mean"] == pytest.approx(figure["top1"]["mean"] - alone["top1"]["mean"])
    (order,) = (order for order in result["orders"] if order["column"] == "above_alone")
    worth = [found[order[row]]["above_alone"]["mean"] for row in ("higher", "lower")]
    assert order["over"]["images"]["mean"] == pytest.approx(worth[0] - worth[1])


def test_same_answers_are_agreement_s(studied: Studied) -> None:
    result, _ = studied.run("knowledge")
    names = {"conv teacher": "conv", "inv teacher": "inv", "another conv teacher": "conv2"}
    loaded = {name: load_predictions(runs(result)[row], f"teachers/{name}") for row, name in names.items()}
    assert not torch.equal(loaded["conv"][0]["class"], loaded["conv2"][0]["class"])
    said = {(name, "class"): logits["class"].argmax(-1) for name, (logits, _) in loaded.items()}
    labels = loaded["conv"][1]
    for row, name in names.items():
        for teacher in ("conv", "inv"):
            first, second = (name, "class"), (teacher, "class")
            wanted = agreement(first, said[first], second, said[second], labels).same
            assert figures(result)[row][f"same_as_{teacher}"]["seeds"]["0"] == pytest.approx(wanted)


def test_other_images_have_a_column_each(studied: Studied, tmp_path: Path) -> None:
    white, val = tmp_path / "white", studied.images / "val"
    for number, label in enumerate(("blue", "green", "red")):
        (white / label).mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).save(white / label / f"{number}.png")
    result, _ = studied.run("shift", shifts=[str(white), str(val)])
    for row in figures(result).values():  # each by its own token
        assert row[str(white)]["mean"] == pytest.approx(1 / 3)  # one answer to three equal images
        assert row[str(val)]["mean"] == row["top1"]["mean"]
    assert "top-1, white" in (studied.out / "shift.md").read_text()


def test_other_images_of_other_classes_are_refused_before_training(studied: Studied, tmp_path: Path) -> None:
    (tmp_path / "other" / "cat").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "cat" / "0.png")
    for folder, said in (("other", "has classes the student does not know: 'cat'"), ("none", "does not exist")):
        with pytest.raises(UserError, match=said):
            studied.run("teachers", shifts=[str(tmp_path / folder)], overrides=["seed=7"])
    (tmp_path / "c" / "fog" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lacks gaussian_noise, .* of ImageNet-C"):
        studied.run("teachers", shifts=[str(tmp_path / "c")], overrides=["seed=7"])
    assert not [path for path in studied.out.rglob("config.yaml") if "seed: 7" in path.read_text()]
    with pytest.raises(UserError, match="has classes the student does not know: 'red'"):
        check_shift(str(studied.images / "val"), CLASSES[:2])
    check_shift(str(studied.images / "val"), CLASSES[:2], CLASSES[:2])  # some were chosen


def test_what_advice_is_worth_is_told_seed_by_seed(tmp_path: Path, tiny_preset: str) -> None:
    (tmp_path / "config.yaml").write_text(load_config(tiny_preset).to_yaml())
    labels = torch.arange(4) % 2
    for student, right in (("alone-0", 1), ("alone-1", 3), ("advised-0", 4), ("advised-1", 2)):
        answers = (labels + (torch.arange(4) >= right)) % 2
        save_predictions(tmp_path, f"students/{student}", {"class": torch.eye(2)[answers]}, labels)
    rows = [
        Finished(tmp_path, tuple(Part(f"students/{role}-{seed}", role, seed) for seed in (0, 1)), "class", tmp_path)
        for role in (ALONE, ADVISED)
    ]
    alone, advised = measured(ABOVE_ALONE, rows)
    assert {seed: np.mean(value) for seed, value in alone.items()} == {0: 0, 1: 0}
    assert {seed: np.mean(value) for seed, value in advised.items()} == {0: 0.75, 1: -0.25}
