"""Each column of a study's table is what its own module says of the same network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from studied import Studied
from tiny import CLASSES, records

from coadvise.config.schema import DataConfig, EngineConfig
from coadvise.deploy.publish import load
from coadvise.errors import UserError
from coadvise.evaluation.agreement import agreement, divergences
from coadvise.evaluation.scores import load_predictions
from coadvise.runs.evaluate import evaluate_run
from coadvise.studies import STUDIES
from coadvise.studies.columns import IMAGES, PARAMETERS, SEVERITIES, SPEED, Column
from coadvise.studies.measures import Finished, check_shift, measure
from coadvise.studies.networks import PAPER_MODELS
from coadvise.training.engine import Engine
from coadvise.training.listener import Silent


def figures(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row["figures"] for row in result["rows"]}


def runs(result: dict[str, Any]) -> dict[str, Path]:
    return {row["name"]: Path(row["run"]) for row in result["rows"]}


def measured(column: Column, rows: list[Finished]) -> list[dict[int, Any]]:
    return measure(column, rows, Engine(EngineConfig(device="cpu")), Silent())


def test_kl_is_agreement_s(studied: Studied) -> None:
    result, _ = studied.run("table5", 2)
    run = runs(result)["CiT-Ti inv token"]
    for seed in (0, 1):
        parts = ("teachers/conv", "teachers/inv", f"students/advised-{seed}")
        wanted = {(d.answer, d.teacher): d.kl for d in divergences({p: load_predictions(run, p)[0] for p in parts})}
        for answer in ("class", "conv", "inv", "average"):
            name = "CiT-Ti average" if answer == "average" else f"CiT-Ti {answer} token"
            got = [figures(result)[name][f"kl_{teacher}"]["seeds"][str(seed)] for teacher in ("conv", "inv")]
            assert got == [wanted[answer, "conv"], wanted[answer, "inv"]]
    said = "the conv token is nearer to ResNet-18 than the inv token is"
    (claim,) = (claim for claim in result["claims"] if claim["text"] == said)
    conv = [figures(result)[f"CiT-Ti {row} token"]["kl_conv"]["mean"] for row in ("inv", "conv")]
    assert claim["difference"] == pytest.approx(conv[0] - conv[1])
    for over in ("images", "seeds"):
        assert claim["over"][over]["mean"] == pytest.approx(claim["difference"])
        assert claim["over"][over]["low"] < claim["over"][over]["mean"] < claim["over"][over]["high"]


def test_overlaps_are_those_of_the_tokens_maps(studied: Studied) -> None:
    result, _ = studied.run("attention")
    images = sorted((studied.images / "val").rglob("*.png"))
    for name, tokens in (("two ResNet-18", ["conv", "conv2"]), ("ResNet-18 + RedNet-26", ["conv", "inv"])):
        pairs = load(runs(result)[name]).attention_maps(images).overlaps()
        (wanted,) = (pair for pair in pairs if pair["tokens"] == tokens)
        for rule in ("last", "rollout"):
            assert figures(result)[name][f"overlap_{rule}"]["mean"] == pytest.approx(wanted[rule], abs=1e-5)
    claim = result["claims"][0]
    last = {name: figures(result)[name]["overlap_last"]["mean"] for name in claim["rows"]}
    assert claim["difference"] == pytest.approx(sum(weight * last[name] for name, weight in claim["rows"].items()))


def test_corruption_error_is_that_of_evaluate_and_is_kept(studied: Studied) -> None:
    result, _ = studied.run("table9")
    run = runs(result)["Random w/ KD, inv token"]
    found = evaluate_run(run, corruptions=True, severities=SEVERITIES, images=IMAGES)["corruptions"]["parts"]
    for name, answer in (("Random w/ KD, inv token", "inv"), ("Random w/ KD, average", "average")):
        wanted = found["students/advised-0"][answer]["mean_corruption_error"]
        assert figures(result)[name]["corruption_error"]["seeds"]["0"] == wanted
    kept = max((studied.out / "scores").glob(f"{run.name}-*.json"), key=lambda path: path.stat().st_mtime_ns)
    written = kept.stat().st_mtime_ns
    assert figures(studied.run("table9")[0]) == figures(result)
    assert kept.stat().st_mtime_ns == written
    kept.write_text("{")  # damaged
    assert figures(studied.run("table9")[0]) == figures(result)
    assert json.loads(kept.read_text())["request"]["images"] == IMAGES


def test_parameters_and_speed_are_of_the_paper_s_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coadvise.studies.measures.SPEED_SIZE", 64)  # pixels, so that it takes seconds
    monkeypatch.setattr("coadvise.studies.measures.SPEED_BATCH", 2)
    rows = [
        Finished(Path(), (), "class", Path(), name) for name in ("RedNet-26", "DeiT-Ti-KD", "CiT-SAK")
    ]  # MODELS.md at 224
    counts = [value for row in measured(PARAMETERS, rows) for value in row.values()]
    assert [round(count / 1e6, 2) for count in counts] == [9.23, 5.88, 25.71]
    assert all(row[0] > 0 for row in measured(SPEED, rows))
    assert {row.network for study in STUDIES.values() for row in study.rows} - {""} <= PAPER_MODELS.keys()
    assert all(timm.is_model(name) for name in PAPER_MODELS.values())


def test_a_teacher_s_accuracy_is_that_of_the_row_s_teacher(studied: Studied) -> None:
    result, _ = studied.run("figure4")
    teachers = {row.name: row.teachers[0] for row in STUDIES["figure4"].rows}
    for name, run in runs(result).items():
        logits, labels = load_predictions(run, f"teachers/{teachers[name]}")
        wanted = (logits["class"].argmax(-1) == labels).double().mean().item()
        found = figures(result)[name]
        assert found["teacher_top1"]["mean"] == pytest.approx(wanted)
        assert found["above_teacher"]["mean"] == pytest.approx(found["top1"]["mean"] - wanted)
    assert all(claim["over"]["images"] is not None for claim in result["claims"] if claim["rows"])


def test_a_gain_is_over_the_same_model_alone(studied: Studied) -> None:
    result, _ = studied.run("table4")
    found = {name: figure["top1"]["mean"] for name, figure in figures(result).items()}
    (claim,) = (claim for claim in result["claims"] if claim["text"].endswith("than Mixer-Ti"))
    gain = {
        model: found[f"{model}, ResNet-18 + RedNet-26"] - found[f"{model}, no teacher"]
        for model in ("Transformer-Ti", "Mixer-Ti")
    }
    assert claim["over"]["images"]["mean"] == pytest.approx(gain["Transformer-Ti"] - gain["Mixer-Ti"])


def test_students_without_advice_learn_from_the_labels_by_every_token(studied: Studied) -> None:
    result, _ = studied.run("table9")
    run = runs(result)["Align w/o KD, inv token"]
    (trained,) = (record for record in records(run, "result"))
    assert trained["top1"].keys() == {"class", "conv", "inv", "average"}
    losses = [record["losses"] for record in records(run, "train")]
    assert losses
    assert all(loss.keys() == {"total", "class", "conv labels", "inv labels"} for loss in losses)
    assert all(loss["total"] == pytest.approx(sum(loss.values()) - loss["total"], rel=1e-5) for loss in losses)


def test_same_answers_are_agreement_s(studied: Studied) -> None:
    result, _ = studied.run("knowledge")
    names = {"ResNet-18": "conv", "RedNet-26": "inv", "another ResNet-18": "conv2"}
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
    result, _ = studied.run("table9", shifts=[str(white), str(val)])
    for row in figures(result).values():  # each by its own token
        assert row[str(white)]["mean"] == pytest.approx(1 / 3)  # one answer to three equal images
        assert row[str(val)]["mean"] == row["top1"]["mean"]
    assert "top-1, white" in (studied.out / "table9.md").read_text()


def test_other_images_of_other_classes_are_refused_before_training(studied: Studied, tmp_path: Path) -> None:
    (tmp_path / "other" / "cat").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "cat" / "0.png")
    for folder, said in (("other", "has classes the student does not know: 'cat'"), ("none", "does not exist")):
        with pytest.raises(UserError, match=said):
            studied.run("table2", shifts=[str(tmp_path / folder)], overrides=["seed=7"])
    (tmp_path / "c" / "fog" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lacks gaussian_noise, .* of ImageNet-C"):
        studied.run("table2", shifts=[str(tmp_path / "c")], overrides=["seed=7"])
    assert not [path for path in studied.out.rglob("config.yaml") if "seed: 7" in path.read_text()]
    with pytest.raises(UserError, match="has classes the student does not know: 'red'"):
        check_shift(str(studied.images / "val"), CLASSES[:2], DataConfig())
    check_shift(str(studied.images / "val"), CLASSES[:2], DataConfig(classes=CLASSES[:2]))  # some were chosen
