"""Predictions of a finished run's networks: the same for every form of an image, and as the run was scored."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ONE_EPOCH, assert_same_weights, make_images, records

import coadvise
from coadvise.data.images import fitted, preprocessing_text, to_array, upright_rgb
from coadvise.deploy.predict import TrainedStudent
from coadvise.deploy.publish import load
from coadvise.errors import UserError
from coadvise.evaluation.scores import load_predictions, scores
from coadvise.runs.evaluate import evaluate_run
from coadvise.runs.run import trained_parts


@pytest.fixture(scope="module")
def student(finished: Path) -> TrainedStudent:
    return load(finished)


@pytest.fixture(scope="module")
def paths(tiny_images: Path) -> list[Path]:
    """The validation images, in the order they are scored in."""
    return sorted((tiny_images / "val").rglob("*.png"))


def test_all_ways_to_give_an_image_get_one_answer(student: TrainedStudent, paths: list[Path]) -> None:
    images = [Image.open(path).convert("RGB") for path in paths]
    arrays = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    floats = [tensor.float() / 255 for tensor in tensors]
    wanted = student.predict(paths)
    for given in ([str(path) for path in paths], images, arrays, tensors, floats, tuple(paths)):
        assert student.predict(given) == wanted
    for one in (paths[0], str(paths[0]), images[0], arrays[0], tensors[0], floats[0]):
        assert student.predict(one) == student.predict(paths[:1])


def test_every_network_answers_as_the_run_was_scored(finished: Path, paths: list[Path]) -> None:
    parts = trained_parts(finished)
    assert parts == ["teachers/conv", "teachers/inv", "students/advised-0", "students/alone-0"]
    for part in parts:
        network, (logits, _) = load(finished, part), load_predictions(finished, part)
        answers = {name: values.softmax(-1) for name, values in logits.items()}
        answers["average"] = torch.stack(list(answers.values())).mean(0)
        for answer, rows in answers.items():
            for prediction, row in zip(network.predict(paths, answer), rows, strict=True):
                assert list(prediction.probabilities) == list(network.classes) == ["blue", "green", "red"]
                assert list(prediction.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
                assert prediction.probability == max(prediction.probabilities.values())
                assert prediction.probabilities[prediction.label] == prediction.probability


def test_large_images_are_resized_as_for_scoring(student: TrainedStudent) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((64, 32))
    small = large.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    assert student.predict(large) == student.predict(small)
    assert student.predict(Image.fromarray(pixels).convert("L"))[0].probability > 0
    assert student.predict(Image.fromarray(pixels).convert("RGBA")) == student.predict(pixels)


def test_an_image_in_memory_is_looked_at_as_its_file_is(student: TrainedStudent, tmp_path: Path) -> None:
    """Turned upright, on white where it is transparent, and of 16 bits not cut off at 255."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[274] = 6
    for image, options in (
        (Image.fromarray(pixels), {}),
        (Image.fromarray(pixels[..., :3]), {"exif": turned}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
    ):
        image.save(tmp_path / "x.png", **options)
        with Image.open(tmp_path / "x.png") as opened:
            assert student.predict(opened) == student.predict(tmp_path / "x.png")
    assert student.predict(pixels) == student.predict(Image.fromarray(pixels))


@pytest.mark.parametrize(("kind", "fit"), [("light", "pad"), ("deit", "stretch")])
def test_rectangles_are_seen_alike_in_training_scoring_and_use(
    kind: str, fit: str, tiny_preset: str, tmp_path: Path
) -> None:
    """Oblong pictures of several shapes, of 8 and of 12 bits, through a cache, copied networks, and an export."""
    data, rng = make_images(tmp_path / "data", train=3, val=2), np.random.default_rng(0)
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        pixels = rng.integers(0, 4096 if number % 2 else 256, (int(rng.integers(8, 30)), int(rng.integers(8, 70))))
        Image.fromarray(pixels.astype(np.uint16 if number % 2 else np.uint8)).save(path)
    how = ["data.image_size=[16, 24]", f"data.fit={fit}", f"augment.kind={kind}", "augment.cutmix=1", *ONE_EPOCH]
    run = coadvise.fit(data, tiny_preset, tmp_path / "run", overrides=how, cache=tmp_path / "logits")
    coadvise.fit(data, tiny_preset, tmp_path / "again", overrides=how, reuse=run)
    assert [record["part"] for record in records(tmp_path / "again", "reused")] == ["teachers/conv", "teachers/inv"]
    written = json.loads((run / "data.json").read_text())
    low, high = written["value_range"]
    assert (written["image_size"], written["fit"]) == ([16, 24], fit)
    assert (low, high) == pytest.approx((0, 4095), abs=100)

    scored, evaluated = sorted((data / "val").rglob("*.png")), evaluate_run(run)["parts"]
    for part in trained_parts(run):
        network, (logits, labels) = load(run, part), load_predictions(run, part)
        assert (network.image_size, network.fit, network.network.values) == ((16, 24), fit, (low, high))
        found = [list(prediction.probabilities.values()) for prediction in network.predict(scored)]
        np.testing.assert_allclose(found, logits["class"].softmax(-1), atol=1e-5)
        assert evaluated[part]["class"]["nll"] == pytest.approx(scores(logits, labels)["class"].nll, rel=1e-5)
    about = coadvise.export(run, tmp_path / "student.pt2")
    assert about["input"]["shape"] == ["batch", 3, 16, 24]
    assert about["made_by"] == preprocessing_text((16, 24), fit, (low, high))
    images = [fitted(upright_rgb(Image.open(path), (low, high)), (16, 24), fit) for path in scored]
    exported = torch.export.load(tmp_path / "student.pt2").module()
    with torch.no_grad():
        found = exported(torch.from_numpy(np.stack([to_array(image) for image in images])) / 255)
    np.testing.assert_allclose(found, load_predictions(run, "students/advised-0")[0]["class"].softmax(-1), atol=1e-5)


def test_batches_change_nothing(student: TrainedStudent, paths: list[Path]) -> None:
    at_once = student.predict(paths)
    for size in (1, 5):
        for one, other in zip(student.predict(paths, batch_size=size), at_once, strict=True):
            assert one.label == other.label
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    assert student.predict([]) == []


def test_a_run_can_be_moved(
    student: TrainedStudent, finished: Path, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "elsewhere" / "run")
    shutil.copy(paths[0], tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    assert load("elsewhere/run").predict("one.png") == student.predict(paths[:1])


def test_the_first_seed_is_the_one_that_is_loaded(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(run / "students" / "alone-0", run / "students" / "advised-10")
    (run / "students" / "advised-0").rename(run / "students" / "advised-2")
    assert trained_parts(run)[2:] == ["students/advised-2", "students/advised-10", "students/alone-0"]
    assert_same_weights(load(run).network.state_dict(), load(finished).network.state_dict())


def test_what_cannot_be_answered_is_said(
    student: TrainedStudent, finished: Path, paths: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image at all")
    for name in ("bad.png", "missing.png"):
        with pytest.raises(UserError, match=f"cannot read image .*{name}"):
            student.predict([paths[0], tmp_path / name])
    with pytest.raises(UserError, match="'convolution'; this network has class, conv, inv and average"):
        student.predict(paths[0], "convolution")
    with pytest.raises(UserError, match="no run directory"):
        load(tmp_path)
    with pytest.raises(UserError, match="'students/advised-7'; it has teachers/conv, teachers/inv, "):
        load(finished, "students/advised-7")
    unfinished = shutil.copytree(finished, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "students")
    with pytest.raises(UserError, match="no finished student yet"):
        load(unfinished)


def test_a_student_alone_answers_by_what_was_trained(finished: Path, paths: list[Path]) -> None:
    alone = load(finished, "students/alone-0/")
    with pytest.raises(UserError, match="no answer 'conv'; this network has class and average"):
        alone.predict(paths, "conv")
    assert alone.predict(paths, "average") == alone.predict(paths)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((8, 8, 3)), r"an array of float64 \[8, 8, 3\] is not an image"),
        (np.zeros(8, np.uint8), "is not an image"),
        (torch.rand(2, 3, 8, 8), r"a tensor of shape \[2, 3, 8, 8\] is not an image; give \[3, H, W\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "a tensor of torch.int64 is not an image"),
        (torch.full((3, 8, 8), 2.0), "values from 2 to 2 is not an image; give floats in"),
        (torch.zeros(3, 0, 8), "is not an image"),
        (None, "None is not an image"),
    ],
)
def test_what_is_not_an_image_is_refused(student: TrainedStudent, given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        student.predict(given)


def test_a_token_whose_teacher_has_no_weight_has_no_answer(
    tiny_images: Path, tiny_preset: str, paths: list[Path], tmp_path: Path
) -> None:
    run = coadvise.fit(tiny_images, tiny_preset, tmp_path / "run", overrides=["teachers.conv.weight=0"])
    student = load(run)
    assert student.model.token_names == ("conv", "inv")
    with pytest.raises(UserError, match="no answer 'conv'; this network has class, inv and average"):
        student.predict(paths, "conv")
    (result,) = [record for record in records(run, "result") if record["role"] == "advised"]
    assert list(result["top1"]) == ["class", "inv", "average"]
    with torch.inference_mode():
        logits = student.network(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        wanted = (logits["class"].softmax(-1) + logits["inv"].softmax(-1)) / 2
        torch.testing.assert_close(student.answering("average")(images), wanted)


def test_a_finished_network_keeps_its_answers_whatever_its_run_is_changed_to(
    tiny_images: Path, tiny_preset: str, paths: list[Path], tmp_path: Path
) -> None:
    run, alone = tmp_path / "run", ["teachers.conv.weight=0"]
    coadvise.fit(tiny_images, tiny_preset, run)
    before = load(run).predict(paths, "average")
    coadvise.fit(tiny_images, tiny_preset, run, seeds=2, overrides=alone, allow_changes=True)
    assert load(run).tokens == ("class", "conv", "inv")
    assert load(run, "students/advised-1").tokens == ("class", "inv")
    assert load(run).predict(paths, "average") == before
    verdict = records(run, "verdict")[-1]
    assert [row["answer"] for row in verdict["rows"]] == ["class", "class", "average", "class", "inv", "average"]
    scores = evaluate_run(run)["parts"]
    assert [list(scores[f"students/advised-{seed}"]) for seed in (0, 1)] == [
        ["class", "conv", "inv", "average"], ["class", "inv", "average"],
    ]  # fmt: skip


def test_a_network_whose_run_s_records_are_gone_answers_by_all_its_tokens(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").write_text("of: another version\n")
    assert load(run).tokens == ("class", "conv", "inv")
    assert load(run, "students/alone-0").tokens == ("class",)
    assert load(run, "teachers/inv").tokens == ("class",)
