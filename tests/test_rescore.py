import shutil
from pathlib import Path

import pytest
from tiny import make_images, records

from coadvise import fit
from coadvise.errors import UserError
from coadvise.predict import trained_parts
from coadvise.rescore import evaluate_run


def test_it_finds_the_run_s_own_scores_again(finished: Path) -> None:
    scores = evaluate_run(finished)
    results = {r["part"]: r["top1"] for r in records(finished, "result")}
    assert scores["parts"] == results
    assert list(scores["parts"]) == trained_parts(finished)
    assert scores["images"] == 12
    assert scores["unreadable"] == []
    assert scores["data"].endswith("(validation)")


def test_other_images_are_scored_one_by_one(finished: Path, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", 1, 3)
    wrong = shutil.copytree(data / "val", tmp_path / "wrong")  # every image in another class's folder
    (wrong / "blue").rename(wrong / "x")
    (wrong / "green").rename(wrong / "blue")
    (wrong / "red").rename(wrong / "green")
    (wrong / "x").rename(wrong / "red")
    right, rotated = evaluate_run(finished, str(data)), evaluate_run(finished, str(wrong))
    assert right["images"] == rotated["images"] == 9
    assert right["data"] == str(data)
    for part in trained_parts(finished):
        assert right["parts"][part]["class"] + rotated["parts"][part]["class"] <= 1
    assert right["parts"] != rotated["parts"]


def test_some_of_the_classes_are_enough_and_keep_their_numbers(finished: Path, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", 1, 3) / "val"
    each = []
    for name in ("blue", "green", "red"):
        shutil.copytree(data / name, tmp_path / f"only {name}" / name)
        each.append(evaluate_run(finished, str(tmp_path / f"only {name}"))["parts"]["students/advised-0"]["class"])
    everything = evaluate_run(finished, str(data))["parts"]["students/advised-0"]["class"]
    assert sum(each) / 3 == pytest.approx(everything)


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
    assert str(bad) in scores["unreadable"][0]


def test_unreadable_among_the_run_s_own_images(tiny_preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    bad = data / "val" / "red" / "1.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    once = [f"{part}.recipe.epochs=1" for part in ("teachers.conv", "teachers.inv", "student")]
    run = fit(data, tiny_preset, tmp_path / "run", overrides=once)
    assert records(run, "verdict")[-1]["images"] == 11
    scores = evaluate_run(run)
    assert scores["images"] == 11
    assert str(bad) in scores["unreadable"][0]
    assert scores["parts"] == {r["part"]: r["top1"] for r in records(run, "result")}


def test_what_cannot_be_scored_is_said(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        evaluate_run(tmp_path)
    with pytest.raises(UserError, match=r"data folder .*nothing.* does not exist"):
        evaluate_run(finished, str(tmp_path / "nothing"))
    other = make_images(tmp_path / "other", 1, 1, classes=("blue", "violet"))
    with pytest.raises(UserError, match=r"has classes the student does not know: 'violet'; it knows 'blue', 'green'"):
        evaluate_run(finished, str(other))
    all_bad = make_images(tmp_path / "bad", 1, 1)
    for path in (all_bad / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 3 images can be read; first fault: .*blue"):
        evaluate_run(finished, str(all_bad))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(finished / "config.yaml", bare)
    with pytest.raises(UserError, match="no finished network yet"):
        evaluate_run(bare)
