import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo
from tiny import make_images, records

from coadvise.config.schema import ModelConfig
from coadvise.deploy.publish import load
from coadvise.errors import UserError
from coadvise.evaluation.corruptions import CORRUPTIONS
from coadvise.evaluation.robustness import made_cases
from coadvise.evaluation.shifts import IMAGENET_A, subset
from coadvise.models.network import build_network
from coadvise.runs import evaluate as rescore
from coadvise.runs.evaluate import evaluate_run
from coadvise.runs.run import trained_parts


def test_it_finds_the_run_s_own_scores_again(finished: Path) -> None:
    scores = evaluate_run(finished)
    for result in records(finished, "result"):
        for figure in ("top1", "top5", "ece", "nll"):
            again = {answer: score[figure] for answer, score in scores["parts"][result["part"]].items()}
            assert again == pytest.approx(result[figure], abs=1e-6)
    assert [row["kl"] for row in scores["divergences"]] == pytest.approx(
        [row["kl"] for row in records(finished, "verdict")[-1]["divergences"]], abs=1e-6
    )
    assert list(scores["parts"]) == trained_parts(finished)
    assert (scores["images"], scores["classes"], scores["unreadable"]) == (12, 3, [])


def test_pictures_that_changed_are_no_longer_the_run_s_own(finished: Path, tiny_images: Path, tmp_path: Path) -> None:
    run, images = shutil.copytree(finished, tmp_path / "run"), shutil.copytree(tiny_images, tmp_path / "images")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"source: {tiny_images}", f"source: {images}"))
    (run / "data.json").unlink()
    assert evaluate_run(run)["images"] == 12
    next((images / "val" / "red").iterdir()).unlink()
    with pytest.raises(UserError, match="was trained: validation images: 1 removed"):
        evaluate_run(run)


def test_other_images_are_scored_one_by_one(finished: Path, tmp_path: Path) -> None:
    """Also a class alone: its name decides the label, not its number."""
    data = make_images(tmp_path / "data", 1, 3)
    each = list[float]()
    for name in ("blue", "green", "red"):
        shutil.copytree(data / "val" / name, tmp_path / f"only {name}" / name)
        only = evaluate_run(finished, str(tmp_path / f"only {name}"))["parts"]
        each.append(only["students/advised-0"]["class"]["top1"])
    everything = evaluate_run(finished, str(data))
    assert (everything["data"], everything["images"]) == (str(data), 9)
    assert sum(each) / 3 == pytest.approx(everything["parts"]["students/advised-0"]["class"]["top1"])


def test_an_unreadable_image_is_named_and_no_other_is_scored_for_it(finished: Path, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", 1, 4) / "val"
    bad = data / "green" / "2.png"
    bad.unlink()
    readable = evaluate_run(finished, str(data))
    bad.write_bytes(b"no image")
    scores = evaluate_run(finished, str(data))
    assert scores["images"] == readable["images"] == 11
    assert scores["parts"] == readable["parts"]
    assert len(scores["unreadable"]) == 1
    assert scores["unreadable"][0].startswith("'green/2.png': ")


def test_what_cannot_be_scored_is_named(finished: Path, tmp_path: Path) -> None:
    other = make_images(tmp_path / "other", 1, 1, classes=("blue", "violet"))
    bad = make_images(tmp_path / "bad", 1, 1)
    for path in (bad / "val").rglob("*.png"):
        path.write_bytes(b"")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(finished / "config.yaml", bare)
    requests: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path, {}, "is no run directory"),
        (bare, {}, "no finished network"),
        (finished, {"data": str(other)}, "'violet'.*'blue', 'green'"),
        (finished, {"data": str(bad)}, "none of the 3 images .*blue"),
        (finished, {"data": str(bad), "layout": "imagenet-q"}, "'imagenet-q'"),
        (finished, {"data": str(bad), "layout": "imagenet-a"}, "200 of the 200 classes"),
        (finished, {"severities": (1,)}, "--corruptions"),
        (finished, {"images": 0}, "0 images"),
        *((finished, {"corruptions": True, "severities": s}, "severities") for s in ((), (1, 1), (6,))),
    ]
    for run, options, names in requests:
        with pytest.raises(UserError, match=names):
            evaluate_run(run, **options)


def test_corrupted_images_are_scored_too(finished: Path) -> None:
    plain = evaluate_run(finished)
    once = evaluate_run(finished, corruptions=True, severities=(1, 5))
    found = once.pop("corruptions")
    assert once == plain
    assert (found["images"], found["severities"]) == (12, [1, 5])
    assert list(found["parts"]) == trained_parts(finished)
    for part, answers in found["parts"].items():
        assert answers.keys() == plain["parts"][part].keys()
        for summary in answers.values():
            assert list(summary["top1"]) == list(CORRUPTIONS)
            for name, rows in summary["by_severity"].items():
                assert summary["top1"][name] == pytest.approx((rows["1"] + rows["5"]) / 2)
            assert summary["mean_corruption_error"] == pytest.approx(1 - np.mean(list(summary["top1"].values())))


def test_some_of_the_images_are_evenly_chosen(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_images(tmp_path / "data", 1, 4) / "val"
    numbers: list[Sequence[int]] = []
    monkeypatch.setattr(rescore, "made_cases", lambda *given: numbers.append(given[1]) or made_cases(*given))
    assert evaluate_run(finished, str(data), images=99)["images"] == 12
    some = evaluate_run(finished, str(data), images=3, corruptions=True, severities=(3,))
    assert some["images"] == some["corruptions"]["images"] == 3
    assert numbers == [[0, 4, 8]], "each is corrupted as it is among all"
    for path in data.rglob("[1-3].png"):  # so what is left is the first image of each class
        path.unlink()
    assert evaluate_run(finished, str(data))["parts"] == some["parts"]


def test_imagenet_c_is_scored_from_its_files(finished: Path, tmp_path: Path) -> None:
    root, images = tmp_path / "c", make_images(tmp_path / "images", 1, 2) / "val"
    for name in CORRUPTIONS:
        for severity in range(1, 6):
            shutil.copytree(images, root / name / str(severity))
    same = evaluate_run(finished, str(tmp_path / "images"))["parts"]
    bad = root / "fog" / "2" / "red" / "0.png"
    bad.write_bytes(b"no image")
    found = evaluate_run(finished, str(root))
    assert (found["layout"], found["images"]) == ("imagenet-c", 6)
    assert len(found["unreadable"]) == 1
    assert found["unreadable"][0].startswith("fog/2: 'red/0.png': ")
    for part, answers in found["corruptions"]["parts"].items():
        for answer, summary in answers.items():
            clean = same[part][answer]["top1"]  # the images were not corrupted, so every folder scores the same
            assert all(summary["top1"][name] == pytest.approx(clean) for name in CORRUPTIONS if name != "fog")
            assert summary["mean_corruption_error"] == pytest.approx(1 - clean, abs=0.01)
            assert summary["relative_to_alexnet"] == pytest.approx((1 - clean) / 0.7888, rel=0.05, abs=0.01)
    with pytest.raises(UserError, match="--corruptions"):
        evaluate_run(finished, str(root), corruptions=True)
    shutil.rmtree(root / "contrast")
    with pytest.raises(UserError, match="contrast"):
        evaluate_run(finished, str(root))


def test_imagenet_a_is_answered_among_its_200_classes(finished: Path, tmp_path: Path) -> None:
    """By an untrained network of 1,000 classes, in an order of its own."""
    rng, imagenet_run = np.random.default_rng(0), tmp_path / "run"
    imagenet_run.mkdir()
    shutil.copy(finished / "config.yaml", imagenet_run)
    config = ModelConfig(model="resnet_small", model_kwargs={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]})
    build_network(config, ImageNetInfo().label_names()[::-1], 16, seed=0).save(imagenet_run / "students" / "alone-0")
    for name in subset(IMAGENET_A):
        (tmp_path / "a" / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "a" / name / "0.png")
    found = evaluate_run(imagenet_run, str(tmp_path / "a"))
    assert (found["layout"], found["classes"], found["images"]) == ("imagenet-a", 200, 200)
    among_all = evaluate_run(imagenet_run, str(tmp_path / "a"), layout="folder")
    assert (among_all["layout"], among_all["classes"], among_all["images"]) == ("folder", 1000, 200)
    network = load(imagenet_run, "students/alone-0")
    rows = network.predict(sorted((tmp_path / "a").rglob("*.png")))
    hits = [max(subset(IMAGENET_A), key=row.probabilities.__getitem__) for row in rows]
    right = np.mean([hit == name for hit, name in zip(hits, subset(IMAGENET_A), strict=True)])
    assert found["parts"]["students/alone-0"]["class"]["top1"] == pytest.approx(right)
    assert found["parts"]["students/alone-0"]["class"]["nll"] < among_all["parts"]["students/alone-0"]["class"]["nll"]
    shutil.rmtree(tmp_path / "a" / subset(IMAGENET_A)[0])
    with pytest.raises(UserError, match="lacks 1 of the 200 classes of imagenet-a"):
        evaluate_run(imagenet_run, str(tmp_path / "a"), layout="imagenet-a")
