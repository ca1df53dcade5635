"""Finding classes and splits, and saying what is wrong with a folder."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from coadvise.data import sources
from coadvise.data.sources import evaluation_split, open_source, passed_over, typical_size
from coadvise.errors import UserError


def lay_out(root: Path, counts: Mapping[str, int]) -> Path:
    """Empty files: sources look at names only."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / folder / f"{number}.png").touch()
    return root


def test_train_and_val(image_folder: Path) -> None:
    source = open_source(image_folder, 0.2, 0)
    assert source.classes == ("blue", "green", "red")
    assert Counter(source.train.labels) == {0: 12, 1: 12, 2: 12}
    assert Counter(source.val.labels) == {0: 6, 1: 6, 2: 6}
    for split, name in ((source.train, "train"), (source.val, "val")):
        assert list(split.paths) == sorted(split.paths)
        for path, label in zip(split.paths, split.labels, strict=True):
            assert path.parent == image_folder / name / source.classes[label]
    assert "val/" in source.note
    assert open_source(image_folder, 0.5, 9) == source  # there is nothing left to chance


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_the_names_of_the_scored_split(tmp_path: Path, name: str) -> None:
    lay_out(tmp_path, {"train/a": 1, "train/b": 1, f"{name}/a": 1, f"{name}/b": 2})
    source = open_source(tmp_path, 0.2, 0)
    assert len(source.val) == 3
    assert f"{name}/" in source.note


def test_of_several_scored_splits_val_is_taken_before_valid_before_test(tmp_path: Path) -> None:
    for name in ("train", "test", "valid", "val"):
        lay_out(tmp_path, {f"{name}/a": 1, f"{name}/b": 1})
        if name != "train":
            assert f"scored on {name}/" in open_source(tmp_path, 0.2, 0).note


def test_images_lie_at_any_depth_under_any_usual_name_and_hidden_ones_do_not_count(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a": 2, "b/deep/deeper": 2, "b/.ipynb_checkpoints": 3, ".git": 2})
    names = [f"x.{ending}" for ending in ("JPG", "jpeg", "png", "bmp", "webp", "gif", "tif", "tiff", "ppm", "pgm")]
    for name in (*names, ".hidden.png", "notes.txt"):
        (tmp_path / "a" / name).touch()
    source = open_source(tmp_path, 0.5, 0)
    assert source.classes == ("a", "b")
    assert len(source.train) + len(source.val) == 4 + len(names)


def files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def passed_over_in(root: Path) -> list[str]:
    source = open_source(root, 0.5, 0)
    return passed_over(source.folders, source.classes)


def test_files_and_folders_that_are_passed_over_are_named(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a": 2, "b": 2})
    assert passed_over_in(tmp_path) == []
    files(tmp_path, "a/1.HEIC", "a/deep/2.heic", "b/notes.txt", "b/README", "b/.hidden.heic", ".git/x", "list.csv")
    files(tmp_path, "phone/1.heic", "phone/2.heic")
    (tmp_path / "empty").mkdir()
    assert passed_over_in(tmp_path) == [
        "left out, no image by its name: 2 .heic, 1 .txt, 1 without ending",
        "left out, without an image: class folder(s) 'empty', 'phone' (2 .heic)",
    ]


def test_files_are_themselves_and_folders_the_images_below(tmp_path: Path) -> None:
    files(tmp_path, "b/deep/2.JPG", "b/1.png", "b/notes.txt", "b/.hidden.png", "x")
    assert sources.image_files([tmp_path / "x", tmp_path / "b"]) == [
        tmp_path / name for name in ("x", "b/1.png", "b/deep/2.JPG")
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty' holds no image \(\.bmp.*\)$"):
        sources.image_files([tmp_path / "empty"])


def test_of_splits_both_are_looked_through(tmp_path: Path) -> None:
    lay_out(tmp_path, {"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1, "train/c": 0})
    files(tmp_path, "train/a/1.heic", "test/a/2.heic", "test/b/3.avif", "test/d/4.avif")
    assert passed_over_in(tmp_path) == [
        "left out, no image by its name: 2 .heic, 1 .avif",
        "left out, without an image: class folder(s) 'c', 'd' (1 .avif)",
    ]


def test_too_few_classes_because_of_a_format(tmp_path: Path) -> None:
    files(tmp_path, "a/1.heic", "b/1.heic", "b/notes.txt")
    hint = r"other folders hold 2 \.heic, 1 \.txt: convert what are images, to JPEG for example"
    with pytest.raises(UserError, match=f"no class folders with images.*{hint}"):
        open_source(tmp_path, 0.5, 0)
    files(tmp_path, "c/1.png", "c/2.png")
    with pytest.raises(UserError, match=f"holds one class, 'c'; at least two.*{hint}"):
        open_source(tmp_path, 0.5, 0)


def test_a_loop_of_links_ends_and_a_linked_class_counts(tmp_path: Path) -> None:
    lay_out(tmp_path / "data", {"a": 2, "b": 2})
    lay_out(tmp_path / "elsewhere", {"c": 2})
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere" / "c")
    assert open_source(tmp_path / "data", 0.5, 0).classes == ("a", "b", "c")


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(2, 40), min_size=2),
    st.floats(0.01, 0.99),
    st.integers(0, 2**31 - 1),
)
def test_the_division_is_stratified_seeded_disjoint_and_complete(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[str, int], fraction: float, seed: int
) -> None:
    root = lay_out(tmp_path_factory.mktemp("divided"), counts)
    source = open_source(root, fraction, seed)
    train, val = set(source.train.paths), set(source.val.paths)
    assert not train & val
    assert len(source.train) + len(source.val) == len(train | val) == sum(counts.values())
    held = Counter(source.classes[label] for label in source.val.labels)
    for name, count in counts.items():
        assert 1 <= held[name] <= count - 1
        assert abs(held[name] - fraction * count) <= 1
    for path, label in zip(source.val.paths, source.val.labels, strict=True):
        assert path.parent.name == source.classes[label]
    assert source == open_source(root, fraction, seed)
    assert f"{fraction:.0%}" in source.note
    assert f"seed {seed}" in source.note


def test_another_seed_holds_out_other_images(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a": 50, "b": 50})
    held = [set(open_source(tmp_path, 0.3, seed).val.paths) for seed in range(3)]
    assert held[0] != held[1] != held[2]


FAULTS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    # what is there; what the message must say: what was given, what is allowed, what to do
    "no images": ({"a": 0, "b": 0}, ("no class folders with images", ".png", "CLASS/IMAGE")),
    "flat": ({".": 3}, ("no class folders with images", "CLASS/IMAGE")),
    "one class": ({"cats": 4}, ("one class", "'cats'", "at least two", "folder of its own")),
    "one class in train": ({"train/cats": 4, "val/cats": 2}, ("one class", "'cats'", "at least two")),
    "only in train": ({"train/a": 1, "train/b": 1, "train/odd": 1, "val/a": 1, "val/b": 1}, ("'odd'", "train", "both")),
    "only in val": ({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1, "val/odd": 1}, ("'odd'", "val", "both")),
    "empty in val": ({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 0}, ("'b'", "train", "both need the same")),
    "train without val": (
        {"train/a": 4, "train/b": 4},
        ("train/ but none of val/, valid/, test/", "add one", "give '"),
    ),
    "one image": ({"a": 3, "few": 1}, ("'few'", "one image", "two or more")),
    "val without train": ({"val/a": 1, "test/a": 1}, ("'test', 'val'", "look like splits", "train/")),
    "val alone": ({"val/a": 1, "val/b": 1}, ("'val', which look like splits", "train/")),
    "other split names": (
        {"Training/a": 1, "Validation/a": 1},
        ("'Training', 'Validation'", "look like splits", "val/"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_explained(tmp_path: Path, fault: str) -> None:
    counts, says = FAULTS[fault]
    with pytest.raises(UserError) as caught:
        open_source(lay_out(tmp_path / "data", counts), 0.2, 0)
    for phrase in (*says, str(tmp_path / "data")):
        assert phrase in str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, what in (("missing", "does not exist"), ("file", "is a file")):
        with pytest.raises(UserError, match=f"{name}' {what}; give a folder of class folders.*digits"):
            open_source(tmp_path / name, 0.2, 0)


def test_a_fault_names_a_few_of_many(tmp_path: Path) -> None:
    names = [f"class{number:02}" for number in range(20)]
    lay_out(tmp_path, {f"train/{name}": 1 for name in names} | {"val/class00": 1})
    with pytest.raises(UserError, match=r"'class01'.*'class05' and 14 more"):
        open_source(tmp_path, 0.2, 0)


def test_the_images_to_score_a_student_on(tmp_path: Path, image_folder: Path) -> None:
    classes = ("blue", "green", "red")
    assert evaluation_split(image_folder, classes) == open_source(image_folder, 0.2, 0).val
    plain = evaluation_split(image_folder / "train", classes)
    assert Counter(plain.labels) == {0: 12, 1: 12, 2: 12}
    some = evaluation_split(lay_out(tmp_path, {"red": 2}), classes)  # a student may be scored on some of its classes
    assert some.labels == (2, 2)
    with pytest.raises(UserError, match=r"does not know: 'blue'.*it knows 'green', 'red'"):
        evaluation_split(image_folder, ("green", "red"))
    with pytest.raises(UserError, match="does not exist"):
        evaluation_split(tmp_path / "missing", classes)
    with pytest.raises(UserError, match="no images of the student's classes"):
        evaluation_split(lay_out(tmp_path / "empty", {"red": 0}), classes)


@pytest.mark.parametrize("split", ["train/", ""])
def test_only_the_chosen_classes_are_used(tmp_path: Path, split: str) -> None:
    folders = [f"{split}{name}" for name in "abcd"] + ([f"val/{name}" for name in "abd"] if split else [])
    lay_out(tmp_path, dict.fromkeys(folders, 4))
    whole = None if split else open_source(tmp_path, 0.5, 0)  # with splits class c is in one of them only
    source = open_source(tmp_path, 0.5, 0, ("d", "a"))
    assert source.classes == ("a", "d")
    assert "; 2 chosen classes" in source.note
    for part in (source.train, source.val):
        half = len(part) // 2
        assert half > 0
        assert Counter(path.parent.name for path in part.paths) == {"a": half, "d": half}
        assert all(source.classes[label] == p.parent.name for p, label in zip(part.paths, part.labels, strict=True))
    if whole:
        assert open_source(tmp_path, 0.5, 0, whole.classes).train == whole.train


def test_chosen_classes_that_are_not_there_are_named_with_the_nearest(tmp_path: Path) -> None:
    lay_out(tmp_path, {"n01440764": 2, "n01443537": 2, "n01484850": 2, "empty": 0})
    with pytest.raises(UserError) as caught:
        open_source(tmp_path, 0.2, 0, ("n01440764", "n0144353", "zebra", "empty"))
    for phrase in (
        f"'{tmp_path}' has no images of 3 of the 4 classes of data.classes: 'empty'",
        "'n0144353', did you mean 'n01443537'?, 'zebra'; its 3 classes are 'n01440764'",
    ):
        assert phrase in str(caught.value)
    lay_out(tmp_path, {"split/train/a": 1, "split/train/b": 1, "split/val/a": 1})
    with pytest.raises(UserError, match=r"'b' are in .*train' but not in .*val'; both need the same"):
        open_source(tmp_path / "split", 0.2, 0, ("a", "b"))
    many = tuple(f"class{number}" for number in range(9))
    with pytest.raises(UserError, match=r"no images of 9 of the 9 classes.*'class4' and others;"):
        open_source(tmp_path, 0.2, 0, many)


def test_a_student_of_chosen_classes_is_scored_on_a_folder_with_more(tmp_path: Path, image_folder: Path) -> None:
    split = evaluation_split(image_folder, ("green", "red"), chosen=("green", "red"))
    assert {path.parent.name: label for path, label in zip(split.paths, split.labels, strict=True)} == {
        "green": 0, "red": 1
    }  # fmt: skip
    with pytest.raises(UserError, match="no images of the student's classes"):
        evaluation_split(lay_out(tmp_path, {"blue": 2}), ("green", "red"), chosen=("green", "red"))


def test_typical_size_passes_over_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for number, size in enumerate([(20, 30), (24, 24), (90, 28), (300, 300)]):  # the last is a decompression bomb
        Image.new("L", size).save(tmp_path / f"{number}.png")
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "empty.png").touch()
    assert typical_size(tmp_path) == 24
    assert typical_size(tmp_path / "missing") == 0


def test_typical_size_is_of_the_same_images_in_whatever_order_the_disk_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("0", 24), ("1", 90)):
        Image.new("L", (size, size)).save(tmp_path / f"{name}.png")
    walk = os.walk
    for reverse in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "walk", lambda top, back=reverse, **how: ((a, b, sorted(c, reverse=back)) for a, b, c in walk(top))
            )
            assert typical_size(tmp_path, look_at=1) == 24


def test_the_digits_are_laid_out_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = open_source("digits", 0.2, 0)
    assert source.classes == tuple("0123456789")
    assert (len(source.train), len(source.val)) == (300, 1497)
    assert set(Counter(source.train.labels).values()) == {30}
    digits = load_digits()
    for split in (source.train, source.val):
        numbers = [int(path.stem) for path in split.paths]
        assert np.array_equal(digits.target[numbers], split.labels)
        levels = np.stack([np.asarray(Image.open(path)) for path in split.paths])
        assert np.abs(levels - digits.images[numbers] * 255 / 16).max() <= 0.5
    before = source.root.stat().st_mtime_ns
    assert open_source("digits", 0.9, 7) == source
    assert source.root.stat().st_mtime_ns == before
    assert [entry.name for entry in (tmp_path / "coadvise").iterdir()] == [source.root.name]


def test_digits_that_cannot_be_laid_out_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file/coadvise' cannot be written; set XDG_CACHE_HOME to a folder that can be"):
        open_source("digits", 0.2, 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "made"))
    source = open_source("digits", 0.2, 0)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # read-only from now on
    assert open_source("digits", 0.2, 0) == source


def test_a_slower_process_takes_the_faster_one_s_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = open_source("digits", 0.2, 0)
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda self: self.name[:6] != "digits" and is_dir(self))  # not there yet
    assert sources._lay_out_digits() == expected.root
    monkeypatch.undo()
    assert len(list((tmp_path / "coadvise").iterdir())) == 1
