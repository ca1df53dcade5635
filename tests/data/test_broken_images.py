"""Runs over folders that hold everything a folder may hold: skipped, counted, listed, never silently replaced."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import encoded
from tiny import Stopper, assert_same_weights, make_images, never, records, weights_of, write_preset

from coadvise import fit
from coadvise.data import workers as workers_module
from coadvise.data.quarantine import FILE
from coadvise.errors import UserError

# One teacher, one student, two epochs of two steps each; files are decoded again for each view.
PRESET = """\
data: {image_size: 16, max_unreadable: 0.3}
augment: {kind: deit, rand_augment: rand-m5-inc1, smoothing: 0.1, mixup: 0.4}
teachers:
  conv:
    model: resnet_small
    model_kwargs: {widths: [8, 16], depths: [1, 1], strides: [2, 2]}
    recipe: &recipe {epochs: 2, batch_size: 12, warmup_epochs: 0.5, evaluations: 2}
student: {model: cit_micro_patch4_32, model_kwargs: {embed_dim: 24, depth: 1}, recipe: *recipe}
engine: {checkpoint_seconds: 0}
"""
PHOTO = encoded(Image.fromarray(np.random.default_rng(3).integers(0, 256, (24, 20, 3), dtype=np.uint8)), "PNG")
BROKEN = {
    b"truncated.png": PHOTO[:-200],
    b"empty.png": b"",
    b"page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    b"flipped.png": PHOTO[:500] + bytes([PHOTO[500] ^ 4]) + PHOTO[501:],  # noticed by PNG's checksums
    b"broken \n\x1b[31m\xff.png": b"not an image",
}
SOUND = {
    b"new\nline \x1b[2J.png": PHOTO,
    b"caf\xe9 \xff.png": PHOTO,
    b"animated.gif": encoded(
        Image.new("L", (20, 24)), "GIF", save_all=True, append_images=[Image.new("L", (20, 24), 9)]
    ),
}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_preset(tmp_path_factory.mktemp("preset"), PRESET)


def put(folder: Path, files: Mapping[bytes, bytes]) -> None:
    for name, content in files.items():
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(content)


def test_every_kind_of_broken_image_is_skipped_and_listed_and_every_odd_one_used(preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", train=8, val=8)
    for split in ("train", "val"):
        folder = data / split / "green"
        put(folder, {**BROKEN, **SOUND})
        os.mkfifo(folder / "pipe.png")
        (folder / "loop.png").symlink_to("loop.png")
        (folder / "loop").symlink_to(folder)
        (data / split / "gone").symlink_to("gone")
    once = ["teachers.conv.recipe.epochs=1", "student.recipe.epochs=1"]
    run = fit(data, preset, tmp_path / "run", overrides=once)
    splits = json.loads((run / "data.json").read_text())["splits"]
    for split, believed in {"train": 1, "val": 0}.items():  # "flipped" only fails when it is decoded
        assert splits[split]["images"] == 24 + len(SOUND) + believed
        assert len(splits[split]["unreadable"]) == len(BROKEN) + 2 - believed
        assert all(line.isprintable() for line in splits[split]["unreadable"])
    *at_first, later = (run / FILE).read_text().splitlines()
    assert at_first == splits["train"]["unreadable"]
    assert "flipped.png" in later
    assert {record["unreadable"] for record in records(run, "train")} == {len(BROKEN) + 2}
    assert records(run, "verdict")[-1]["images"] == 24 + len(SOUND)
    assert any("pipe.png': not a regular file" in line for line in splits["train"]["unreadable"])
    assert any("loop.png': " in line and "symbolic links" in line for line in splits["train"]["unreadable"])
    page = (run / "report.html").read_text(encoding="utf-8")  # whatever the names, it is text
    assert "404" not in page


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_broken_images_are_refused_before_anything_is_written(preset: str, tmp_path: Path, split: str) -> None:
    data = make_images(tmp_path / "data")
    (data / split / "red" / "0.png").write_bytes(b"")
    what = {"train": "1 of 24 training", "val": "1 of 12 validation"}[split]
    with pytest.raises(UserError, match=rf"{what} images cannot be read, data\.max_unreadable=0\.04 allows 4%.*0\.png"):
        fit(data, preset, tmp_path / "run", overrides=["data.max_unreadable=0.04"])
    assert not (tmp_path / "run").exists()


class Once(Stopper):
    """A listener that does something after one step of one network."""

    def __init__(self, part: str, step: int, do: Callable[[], None]) -> None:
        super().__init__(never)
        self.part, self.step, self.do = part, step, do

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        super().progress(part, done, total, figures)
        if (part, done) == (self.part, self.step):
            self.do()


def test_files_that_disappear_while_training_are_skipped_listed_and_counted(preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", train=8, val=2)
    lost = [data / "train" / "blue" / "3.png", data / "train" / "red" / "7.png"]

    def lose() -> None:
        lost[0].unlink()
        lost[1].write_bytes(b"<html>")

    listener = Once("teachers/conv", 2, lose)
    run = fit(data, preset, tmp_path / "run", listener=listener)
    lines = (run / FILE).read_text().splitlines()
    assert sorted(line.partition("': ")[0] for line in lines) == [f"'{path.relative_to(data)}" for path in lost]
    assert [r["unreadable"] for r in records(run, "train")] == [0, 2, 2, 2]
    assert sum("a training image is skipped from now on: " in text for text in listener.said) == 2
    with pytest.raises(UserError, match=r"training images: .*blue/3\.png.*--allow-changes"):
        fit(data, preset, run, seeds=2)


def test_too_many_that_disappear_end_the_run_and_it_goes_on_once_they_are_back(preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", train=8, val=2)
    content = {path: path.read_bytes() for path in (data / "train" / "blue").iterdir()}

    def lose() -> None:
        for path in content:
            path.unlink()

    listener = Once("students/advised-0", 2, lose)
    with pytest.raises(UserError, match=r"8 of 24 training images cannot be read, data\.max_unreadable=0\.3 allows"):
        fit(data, preset, tmp_path / "run", listener=listener)
    for path, whole in content.items():
        path.write_bytes(whole)
    run = fit(data, preset, tmp_path / "run")
    assert records(run, "verdict")
    assert (run / FILE).read_text() == ""
    undisturbed = fit(data, preset, tmp_path / "undisturbed")  # the run was ended before a step saw another image
    assert_same_weights(weights_of(run, "students/advised-0"), weights_of(undisturbed, "students/advised-0"))


def test_an_image_to_be_scored_that_disappears_ends_the_run_until_it_is_back(preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", train=8, val=2)
    path = data / "val" / "green" / "1.png"
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"to be scored can no longer be read: '.*1\.png'.*none is scored in"):
        fit(data, preset, tmp_path / "run", listener=Once("students/advised-0", 1, path.unlink))
    with pytest.raises(UserError, match=r"validation images: 1 removed.*green/1\.png"):
        fit(data, preset, tmp_path / "run")
    path.write_bytes(content)
    run = fit(data, preset, tmp_path / "run")
    assert records(run, "verdict")[-1]["images"] == 6


def test_a_loader_process_that_is_killed_ends_the_run_which_then_goes_on(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "LOOK_EVERY", 0.5)
    data = make_images(tmp_path / "data", train=24, val=2)
    overrides = ["data.workers=2", "teachers.conv.recipe.epochs=1", "student.recipe.batch_size=4"]

    def strike() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(UserError, match=r"loader process.* was ended by SIGKILL.*again to go on"):
        fit(data, preset, tmp_path / "run", overrides=overrides, listener=Once("students/advised-0", 20, strike))
    assert not multiprocessing.active_children()
    listener = Stopper(never)
    run = fit(data, preset, tmp_path / "run", overrides=overrides, listener=listener)
    assert "students/advised-0: going on from step 18" in listener.said
    assert records(run, "verdict")
