"""Finding classes, splits and pictures, and saying what is wrong with a folder."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pillow_heif import register_heif_opener
from sklearn.datasets import load_digits

from coadvise.config.schema import DataConfig
from coadvise.data.images import decode
from coadvise.data.sources import (
    Source,
    Split,
    evaluation_remarks,
    evaluation_split,
    open_source,
    resolved,
    typical_size,
)
from coadvise.data.sources.folder import EXTENSIONS, HEIF_EXTENSIONS, image_files
from coadvise.errors import UserError


def lay_out(root: Path, counts: Mapping[str, int]) -> Path:
    """Empty files: sources look at names only."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / folder / f"{number}.png").touch()
    return root


def opened(data: str | Path, fraction: float = 0.2, seed: int = 0, **how: Any) -> Source:
    return open_source(data, DataConfig.model_validate({"val_fraction": fraction, **how}), seed)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def contents(split: Split) -> list[tuple[str, int]]:
    return list(zip(split.names(), split.labels.tolist(), strict=True))


def count(split: Split) -> dict[int, int]:
    return dict(Counter(split.labels.tolist()))


# folders -------------------------------------------------------------------------------------------------------------


def test_train_and_val(image_folder: Path) -> None:
    source = opened(image_folder, 0.2, 0)
    assert source.where == str(image_folder)
    assert source.classes == ("blue", "green", "red")
    assert (count(source.train), count(source.val)) == ({0: 12, 1: 12, 2: 12}, {0: 6, 1: 6, 2: 6})
    for split, name in ((source.train, "train"), (source.val, "val")):
        assert split.names() == sorted(split.names())
        for index, (picture, label) in enumerate(contents(split)):
            assert Path(picture).parent == Path(name, source.classes[label])
            assert split.read(index) == (image_folder / picture).read_bytes()
    again = opened(image_folder, 0.5, 9)  # seed and fraction have no effect here
    assert (contents(again.train), contents(again.val)) == (contents(source.train), contents(source.val))


@pytest.mark.parametrize(("root", "val"), [("data", "val"), ("./data/", "valid"), ("../{}/data", "test"), (".", "val")])
def test_names_are_relative_to_the_data_folder_however_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, val: str
) -> None:
    lay_out(tmp_path / "data", {"train/a": 1, "train/b/deep": 1, f"{val}/a": 1, f"{val}/b": 1})
    monkeypatch.chdir(tmp_path / "data" if root == "." else tmp_path)
    source = opened(root.format(tmp_path.name), 0.2, 0)
    assert source.train.names() == ["train/a/0.png", "train/b/deep/0.png"]
    assert source.val.read(1) == b""
    assert f"{val}/" in source.note
    assert resolved(source.where) == str(tmp_path / "data")


def test_images_lie_at_any_depth_with_any_usual_ending_and_hidden_ones_do_not_count(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a": 2, "b/deep/deeper": 2, "b/.ipynb_checkpoints": 3, ".git": 2})
    names = [f"x.{ending}" for ending in ("JPG", "jpeg", "png", "bmp", "webp", "gif", "tif", "tiff", "ppm", "pgm")]
    touch(tmp_path / "a", *names, ".hidden.png", "notes.txt")
    source = opened(tmp_path, 0.5, 0)
    assert source.classes == ("a", "b")
    assert len(source.train) + len(source.val) == 4 + len(names)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a": 2, "b": 2})
    assert opened(tmp_path, 0.5, 0).remarks == ()
    touch(tmp_path, "a/1.CR2", "a/deep/2.cr2", "b/notes.txt", "b/README", "b/.hidden.cr2", ".git/x", "list.csv")
    touch(tmp_path, "phone/1.cr2", "phone/2.cr2", "empty/.x")
    remarks = opened(tmp_path, 0.5, 0).remarks
    assert "2 .cr2, 1 .txt, 1 without ending" in remarks[0]
    assert "'empty', 'phone' (2 .cr2)" in remarks[1]
    assert evaluation_remarks(tmp_path) == remarks


def test_too_few_classes_because_of_a_format(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.cr2", "b/1.cr2", "c/1.png")
    with pytest.raises(UserError, match=r"one class, 'c'.*other folders hold 2 \.cr2"):
        opened(tmp_path, 0.5, 0)


def test_a_loop_of_links_ends_and_a_linked_class_counts(tmp_path: Path) -> None:
    lay_out(tmp_path / "data", {"a": 2, "b": 2})
    lay_out(tmp_path / "elsewhere", {"c": 2})
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere" / "c")
    assert opened(tmp_path / "data", 0.5, 0).classes == ("a", "b", "c")


def test_a_name_of_any_bytes_is_text_and_the_file_is_read(tmp_path: Path) -> None:
    lay_out(tmp_path, {"b": 2})
    for file in (b"caf\xe9 \xff.png", b"new\nline.png"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/" + file))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file)
    split = evaluation_split(tmp_path, ("a", "b"))
    assert [split.read(index) for index in (0, 1)] == [b"caf\xe9 \xff.png", b"new\nline.png"]
    assert split.name(0).encode() == b"a/caf\\xe9 \\xff.png"


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(2, 40), min_size=2),
    st.floats(0.01, 0.99),
    st.integers(0, 2**31 - 1),
)
def test_the_division_is_stratified_seeded_disjoint_and_complete(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[str, int], fraction: float, seed: int
) -> None:
    root = lay_out(tmp_path_factory.mktemp("divided"), counts)
    source = opened(root, fraction, seed)
    train, val = set(source.train.names()), set(source.val.names())
    assert not train & val
    assert len(source.train) + len(source.val) == len(train | val) == sum(counts.values())
    held = count(source.val)
    for label, name in enumerate(source.classes):
        assert 1 <= held[label] <= counts[name] - 1
        assert abs(held[label] - fraction * counts[name]) <= 1
    assert all(Path(name).parent.name == source.classes[label] for name, label in contents(source.val))
    assert contents(opened(root, fraction, seed).val) == contents(source.val)
    assert f"{fraction:.0%}" in source.note
    assert f"seed {seed}" in source.note


FAULTS = {
    # what is there, and what the message must say
    "no images": ({"a": 0, "b": 0}, "no class folders with images.*CLASS/IMAGE"),
    "flat": ({".": 3}, "no class folders with images"),
    "one class": ({"train/cats": 4, "val/cats": 2}, "one class, 'cats'"),
    "only in val": ({"train/a": 1, "train/b": 1, "val/odd": 1, "val/b": 1}, "no image of 'odd' to train on.*exclude"),
    "train without val": ({"train/a": 4, "train/b": 4}, "train/ but none of val/.*data.splits"),
    "one image": ({"a": 3, "few": 1}, "1 of its 2 classes.*one image, 'few'"),
    "nothing to train on": (
        {"Testing/a": 1, "Validation/a": 1},
        "'Testing', 'Validation'.*none to train on.*training/",
    ),
    "no image to score on": ({"train/a": 1, "train/b": 1, "test": 2}, "test split has no images.*data.splits"),
    "misspelt": ({"train/dog": 1, "train/b": 1, "val/dogs": 1, "val/b": 1}, "no image of 'dogs'.*did you mean 'dog'"),
    "two of a kind": ({"train/a": 1, "val/a": 1, "valid/a": 1}, "both 'val' and 'valid'.*data.splits"),
    "a parent": (
        {"sets/train/a": 1, "sets/val/a": 1, "docs/x": 1},
        "'sets', which has splits of its own; give '.*sets'",
    ),
    "a parent of classes": (
        {"dataset/a": 2, "dataset/b": 2, "sample_images": 3},
        "only 'dataset' has folders of images inside, 2 .*give '.*dataset'.*data.depth=top",
    ),
    "a lone parent": ({"dataset/a": 2, "dataset/b": 2}, "one class, 'dataset'.*'.*dataset' has 2 .*give that folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_explained(tmp_path: Path, fault: str) -> None:
    counts, says = FAULTS[fault]
    with pytest.raises(UserError, match=says) as caught:
        opened(lay_out(tmp_path / "data", counts), 0.2, 0)
    assert str(tmp_path / "data") in str(caught.value)


def test_a_class_in_place_of_its_parent_and_a_choice_of_one_class_are_explained(tmp_path: Path) -> None:
    lay_out(tmp_path / "data", {"a": 2, "b": 2})
    with pytest.raises(UserError, match=r"holds images and no class folders; if it is a class, give '.*data'"):
        opened(tmp_path / "data" / "a")
    with pytest.raises(UserError, match=r"data.exclude leave one class of '.*data', 'b'"):
        opened(tmp_path / "data", exclude=["a"])
    assert "data.depth=3, but folders are 1 deep" in opened(tmp_path / "data", depth=3).remarks[0]


def test_trains_may_be_a_class(tmp_path: Path) -> None:
    source = opened(lay_out(tmp_path, {"bus": 5, "car": 5, "train": 5}), 0.2, 0)
    assert source.classes == ("bus", "car", "train")


def test_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, what in (("missing", "does not exist"), ("file", "is a file")):
        with pytest.raises(UserError, match=f"{name}' {what}; give a folder of class folders.*digits"):
            opened(tmp_path / name, 0.2, 0)


def test_the_images_to_score_a_student_on(tmp_path: Path, image_folder: Path) -> None:
    classes = ("blue", "green", "red")
    assert contents(evaluation_split(image_folder, classes)) == contents(opened(image_folder, 0.2, 0).val)
    assert count(evaluation_split(image_folder / "train", classes)) == {0: 12, 1: 12, 2: 12}
    some = evaluation_split(lay_out(tmp_path, {"red": 2}), classes)  # a student may be scored on some of its classes
    assert some.labels.tolist() == [2, 2]
    with pytest.raises(UserError, match="does not know: 'blue'"):
        evaluation_split(image_folder, ("green", "red"))
    with pytest.raises(UserError, match="no images of the student's classes"):
        evaluation_split(lay_out(tmp_path / "empty", {"red": 0}), classes)


@pytest.mark.parametrize("split", ["train/", ""])
def test_only_the_chosen_classes_are_used(tmp_path: Path, split: str) -> None:
    folders = [f"{split}{name}" for name in "abcd"] + ([f"val/{name}" for name in "abd"] if split else [])
    lay_out(tmp_path, dict.fromkeys(folders, 4))
    whole = None if split else opened(tmp_path, 0.5, 0)  # with splits class c is in one of them only
    source = opened(tmp_path, 0.5, 0, classes=("d", "a"))
    assert source.classes == ("a", "d")
    assert "; 2 chosen classes" in source.note
    for part in (source.train, source.val):
        assert count(part) == {0: len(part) // 2, 1: len(part) // 2}
        assert all(source.classes[label] == Path(name).parent.name for name, label in contents(part))
    if whole:
        assert contents(opened(tmp_path, 0.5, 0, classes=whole.classes).train) == contents(whole.train)


def test_chosen_classes_that_do_not_exist_are_named_with_the_nearest(tmp_path: Path) -> None:
    lay_out(tmp_path, {"n01440764": 2, "n01443537": 2, "n01484850": 2, "empty": 0})
    with pytest.raises(
        UserError, match=r"data.classes names 3 class.*'empty', 'n0144353', did you mean 'n01443537'\?, 'zebra'"
    ):
        opened(tmp_path, 0.2, 0, classes=("n01440764", "n0144353", "zebra", "empty"))


def test_files_are_themselves_and_folders_the_images_below(tmp_path: Path) -> None:
    touch(tmp_path, "b/deep/2.JPG", "b/1.png", "b/notes.txt", "b/.hidden.png", "x", "empty/1.cr2")
    found = image_files([tmp_path / "x", tmp_path / "b"])
    assert found == [tmp_path / name for name in ("x", "b/1.png", "b/deep/2.JPG")]
    with pytest.raises(UserError, match=r"empty' holds no image \(\.bmp.*\), but 1 \.cr2$"):
        image_files([tmp_path / "empty"])


def test_typical_size_skips_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for number, size in enumerate([(20, 30), (24, 24), (90, 28), (300, 300)]):  # the last is a decompression bomb
        Image.new("L", size).save(tmp_path / f"{number}.png")
    (tmp_path / "page.jpg").write_text("<html>")
    touch(tmp_path, "empty.png")
    assert typical_size(tmp_path) == 24
    assert typical_size(tmp_path / "missing") == 0


def test_the_order_is_the_same_on_every_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, {"a": 30, "b": 30, "b/c": 3})
    walk = os.walk
    for reverse in (False, True):
        monkeypatch.setattr(
            os, "walk", lambda top, back=reverse, **how: ((a, b, sorted(c, reverse=back)) for a, b, c in walk(top))
        )
        names = evaluation_split(tmp_path, ("a", "b")).names()
        assert names == sorted(names, key=lambda name: Path(name))


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("scored", ["val", "Valid", "validation", "dev", "test", "Testing", "eval"])
def test_splits_go_by_any_usual_name_in_any_case(tmp_path: Path, train: str, scored: str) -> None:
    lay_out(tmp_path, {f"{train}/a": 3, f"{train}/b": 3, f"{scored}/a": 1, f"{scored}/b": 1, "docs": 0})
    source = opened(tmp_path)
    assert (len(source.train), len(source.val), source.test) == (6, 2, None)
    assert source.note == f"trained on {train}/, scored on {scored}/"


def test_with_three_splits_the_test_split_is_scored(tmp_path: Path) -> None:
    lay_out(tmp_path, {f"{split}/{name}": n for split, n in (("train", 3), ("val", 2), ("test", 1)) for name in "ab"})
    source = opened(tmp_path)
    assert source.test is not None
    assert [len(split) for split in (source.train, source.val, source.test)] == [6, 4, 2]
    assert source.note == "trained on train/, scored on test/, learning curves on val/"
    assert contents(evaluation_split(tmp_path, ("a", "b"))) == contents(source.test)
    other = opened(tmp_path, splits={"train": "test", "val": "train"})
    assert (other.note, other.test) == ("trained on test/, scored on train/", None)
    with pytest.raises(UserError, match=r"data.splits.val=tset.*did you mean 'test'"):
        opened(tmp_path, splits={"train": "train", "val": "tset"})


@pytest.mark.parametrize("given", [{"train": "train"}, {"val": "val", "test": "test"}, {"train": "val", "val": "val"}])
def test_given_splits_are_one_to_train_on_and_others_to_score_on(tmp_path: Path, given: Mapping[str, str]) -> None:
    lay_out(tmp_path, {f"{split}/{name}": 2 for split in ("train", "val", "test") for name in "ab"})
    with pytest.raises(UserError, match=r"must name one split to train on and another to score on.*'test', 'train'"):
        opened(tmp_path, splits=given)


def test_keys_that_would_change_nothing_are_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "t.csv").write_text("image,label\na/0.png,a\n")
    for data, key, value in (
        (tmp_path, "label_column", "x"),
        (tmp_path / "t.csv", "depth", 2),
        ("digits", "splits", {"train": "a", "val": "b"}),
    ):
        with pytest.raises(UserError, match=f"data.{key}=.* has no use, since '{data}' is .*; leave it out"):
            opened(data, **{key: value})
    with pytest.raises(UserError, match=r"t.csv' has no column of splits, so data.splits has no use"):
        opened(tmp_path / "t.csv", splits={"train": "a", "val": "b"})


def test_a_table_beside_class_folders_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path, {"images": 4})
    (tmp_path / "list.csv").touch()
    with pytest.raises(UserError, match=r"data.exclude names.*1 table\(s\) there; to use one give '.*list.csv'"):
        opened(tmp_path, exclude=["Skip"])
    lay_out(tmp_path, {"more": 4})
    assert opened(tmp_path).remarks == evaluation_remarks(tmp_path)
    assert "give '" + str(tmp_path / "list.csv") in opened(tmp_path).remarks[-1]


def test_a_class_that_a_scored_split_lacks_is_a_warning_and_labels_stay(tmp_path: Path) -> None:
    lay_out(tmp_path, {"train/a": 2, "train/b": 2, "train/c": 2, "val/a": 1, "val/b": 0, "val/c": 1})
    source = opened(tmp_path)
    assert source.classes == ("a", "b", "c")
    assert contents(source.val) == [("val/a/0.png", 0), ("val/c/0.png", 2)]
    assert any("warning: val has no image of 'b'" in line for line in source.remarks)


def test_a_limit_of_training_images_a_class_keeps_the_same_ones_as_a_larger_limit(tmp_path: Path) -> None:
    lay_out(tmp_path, {"train/a": 30, "train/b": 3, "train/c": 12, "val/a": 4, "val/b": 4, "val/c": 4})
    whole = opened(tmp_path)
    kept = {most: contents(opened(tmp_path, per_class=most).train) for most in (1, 5, 12, 30)}
    assert [Counter(label for _, label in kept[most]) for most in (1, 5)] == [{0: 1, 1: 1, 2: 1}, {0: 5, 1: 3, 2: 5}]
    assert set(kept[1]) < set(kept[5]) < set(kept[12]) < set(kept[30])
    assert kept[30] == contents(whole.train)
    limited = opened(tmp_path, per_class=5, seed=1)
    assert kept[5] == sorted(kept[5], key=contents(whole.train).index) != contents(limited.train)
    assert contents(limited.val) == contents(whole.val)
    assert limited.note.endswith("at most 5 training images a class")


def test_the_depth_of_class_folders(tmp_path: Path) -> None:
    lay_out(tmp_path, {"cats/tabby": 3, "cats/siamese": 3, "dogs/small/pug": 3, "dogs/large": 3})
    top = opened(tmp_path)
    assert top.classes == ("cats", "dogs")
    assert "2 top folders are the classes; 4 folders below them hold the images" in top.remarks[0]
    assert "data.depth=leaf" in top.remarks[0]
    assert opened(tmp_path, depth="leaf").classes == ("cats/siamese", "cats/tabby", "dogs/large", "dogs/small/pug")
    two = opened(tmp_path, depth=2)
    assert two.classes == ("cats/siamese", "cats/tabby", "dogs/large", "dogs/small")
    assert {Path(name).parts[0] for name in two.train.names()} == {"cats", "dogs"}
    lay_out(tmp_path / "x", {"dataset/a": 2, "dataset/b": 2, "sample_images": 3})
    assert opened(tmp_path / "x", depth="top").classes == ("dataset", "sample_images")  # said so, so believed


def test_images_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a": 1, "b": 2})
    for number, (kind, name) in enumerate({"JPEG": "1.ashx", "PNG": "2", "WEBP": "3.img", "TIFF": "4.dat"}.items()):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "a" / name, kind)
    (tmp_path / "a" / "list.txt").write_text("BMW and others")
    (tmp_path / "a" / "pipe").mkdir()
    source = opened(tmp_path)
    assert len(source.train) + len(source.val) == 1 + 4 + 2
    assert source.remarks == ("left out, no image: 1 .txt",)


def test_photographs_of_phones_need_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_heif_opener()
    lay_out(tmp_path, {"a": 2, "b": 2})
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "a" / "x.HEIC", quality=100)
    (name,) = (name for name in evaluation_split(tmp_path, ("a", "b")).names() if name.endswith("HEIC"))
    image = decode((tmp_path / name).read_bytes(), name)
    assert (image.size, image.mode) == ((40, 30), "RGB")
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 30)).max() < 8
    monkeypatch.setattr("coadvise.data.sources.folder.EXTENSIONS", EXTENSIONS - HEIF_EXTENSIONS)
    assert opened(tmp_path).remarks == (
        "left out, no image: 1 .heic; .heic needs the extra heic: pip install 'coadvise[heic]'",
    )


def test_classes_are_left_out_merged_and_renamed(tmp_path: Path) -> None:
    lay_out(tmp_path, {"trash": 4, "metal": 4, "paper": 4, "cardboard": 4, "Not sure": 4})
    assert opened(tmp_path, exclude=["Not sure"]).classes == ("cardboard", "metal", "paper", "trash")
    merged = {"waste": ["trash", "metal"], "paper": ["paper", "cardboard"]}
    source = opened(tmp_path, 0.5, classes=merged)
    assert source.classes == ("paper", "waste")
    assert (count(source.train), count(source.val)) == ({0: 4, 1: 4}, {0: 4, 1: 4})
    for name, label in contents(source.train):
        assert Path(name).parent.name in merged[source.classes[label]]
    split = evaluation_split(tmp_path, ("paper", "waste"), DataConfig.model_validate({"classes": merged}))
    assert count(split) == {0: 8, 1: 8}
    assert opened("digits", classes={"odd": ["1", "3"], "even": "2"}).classes == ("even", "odd")
    for wrong, says in (
        ({"exclude": ["Not sur"]}, "data.exclude names 1 class.*'Not sur', did you mean 'Not sure'"),
        ({"classes": {"a": ["trash"], "b": ["plastic"]}}, "data.classes names 1 class.*'plastic'"),
    ):
        with pytest.raises(UserError, match=says):
            opened(tmp_path, **wrong)


# named sources -------------------------------------------------------------------------------------------------------


def test_the_digits_are_scikit_learn_s_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = opened("digits", 0.2, 0)
    assert resolved("digits") == source.where == "digits"
    assert source.classes == tuple("0123456789")
    assert (len(source.train), len(source.val)) == (300, 1497)
    assert set(count(source.train).values()) == {30}
    digits = load_digits()
    for split in (source.train, source.val):
        numbers = [int(Path(name).stem) for name in split.names()]
        assert np.array_equal(digits.target[numbers], split.labels)
        levels = np.stack([np.asarray(decode(split.read(index), ""))[..., 0] for index in range(len(split))])
        assert np.abs(levels - digits.images[numbers] * 255 / 16).max() <= 0.5
    assert source.train.names()[:2] == ["train/0/0000.png", "train/0/0010.png"]
    assert not list(tmp_path.iterdir())


def test_classes_of_a_named_source_can_be_chosen() -> None:
    whole, some = opened("digits", 0.2, 0), opened("digits", 0.2, 0, classes=("7", "1"))
    assert some.classes == ("1", "7")
    expected = [(name, "17".index(str(label))) for name, label in contents(whole.train) if label in (1, 7)]
    assert contents(some.train) == expected
    scored = evaluation_split("digits", ("7", "1"), DataConfig(classes=("1", "7")))
    assert scored.labels.tolist() == sorted(scored.labels.tolist())
    assert {name.split("/")[1]: label for name, label in contents(scored)} == {"7": 0, "1": 1}
    assert contents(scored.subset([3, 1])) == [contents(scored)[3], contents(scored)[1]]


def test_sources_are_light_to_import() -> None:
    code = "import sys, coadvise.data.sources; print({'torch', 'timm', 'sklearn', 'scipy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
