"""The run directory: another configuration, other images, a disk that is too small or cannot be written."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny import ONE_EPOCH, Stopper, assert_same_weights, command, contents, never, records, weights_of

from coadvise import fit
from coadvise.config.reading import load_config
from coadvise.errors import Interrupted, StorageError, UserError
from coadvise.runs.run import CONFIG, PICTURES, check_folder, check_space
from coadvise.training.metrics import read_records

MEGABYTE = 1_000_000


def stopped(data: Path, preset: str, run: Path, *overrides: str) -> Path:
    """A run whose first network has taken three steps."""
    with pytest.raises(Interrupted):
        fit(data, preset, run, overrides=overrides, listener=Stopper(lambda part, step: step == 3))
    return run


def test_a_record_has_a_command_that_a_shell_takes(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/coadvise/__main__.py", "fit", "my photos", "data.classes=[cat, dog]"])
    run = stopped(tiny_images, tiny_preset, tmp_path / "run")
    assert next(iter(read_records(run)))["command"] == "coadvise fit 'my photos' 'data.classes=[cat, dog]'"


# Another configuration


def test_keys_that_change_no_result_may_differ(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    run = stopped(tiny_images, tiny_preset, tmp_path / "run")
    other = Stopper(lambda part, step: True)
    with pytest.raises(Interrupted, match="step 1 of 4 of teachers/inv"):
        fit(tiny_images, tiny_preset, run, overrides=["data.workers=2", "engine.timeout_seconds=60"], listener=other)
    assert other.steps == [("teachers/conv", 4), ("teachers/inv", 1)]
    changes = ["data.workers: 0 -> 2", "engine.timeout_seconds: 600.0 -> 60.0"]
    assert [text for text in other.said if text.startswith("changed")] == [f"changed: {line}" for line in changes]
    assert [r["changed"] for r in records(run, "run")] == [[], changes]


def test_a_changed_configuration_needs_permission(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    run, slower = stopped(tiny_images, tiny_preset, tmp_path / "run"), "teachers.conv.recipe.learning_rate=0.0001"
    before = contents(run)
    for override, key in ((slower, "conv.recipe.learning_rate"), ("seed=1", "seed"), ("student.weight=2", "weight")):
        with pytest.raises(UserError, match=f"{key}: .* -> .*--allow-changes"):
            fit(tiny_images, tiny_preset, run, overrides=[override])
    assert contents(run) == before
    for override, says in (
        ("teachers.conv.model_kwargs.widths=[8, 24]", "step-00000003"),
        ("teachers.conv.recipe.epochs=1", "step 3, .* 2"),
    ):  # no checkpoint fits
        with pytest.raises(UserError, match=says):
            fit(tiny_images, tiny_preset, shutil.copytree(run, tmp_path / "copy"), overrides=[override],
                allow_changes=True)  # fmt: skip
        assert list((tmp_path / "copy" / "checkpoints" / "teachers.conv").iterdir())
        shutil.rmtree(tmp_path / "copy")
    rest = Stopper(lambda part, step: part == "teachers/inv")
    with pytest.raises(Interrupted):
        fit(tiny_images, tiny_preset, run, overrides=[slower], allow_changes=True, listener=rest)
    assert rest.steps[0] == ("teachers/conv", 4)
    wanted = load_config(tiny_preset, [slower], source=str(tiny_images))
    assert check_folder(run, wanted, allow_changes=False) == [], "config.yaml has the new configuration"
    assert records(run, "run")[-1]["changed"] == ["teachers.conv.recipe.learning_rate: 0.001 -> 0.0001"]


def test_a_run_that_was_killed_while_it_began_can_be_begun(tiny_preset: str, tmp_path: Path) -> None:
    for name in (".lock", f".{CONFIG}.part"):
        (tmp_path / name).touch()
    assert check_folder(tmp_path, load_config(tiny_preset, source="x"), allow_changes=False) == []


# Other images


@pytest.fixture
def own_images(tiny_images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_images, tmp_path / "images"))


def replace(data: Path, split: str) -> str:
    """Replaces an image by one of another class."""
    name = f"{split}/red/0.png"
    shutil.copy(data / split / "blue" / "1.png", data / name)
    return "red/0.png"


@pytest.mark.parametrize("change", ["added", "removed", "replaced"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_changed_images_are_named_and_refused(
    split: str, change: str, finished: Path, own_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = moved(finished, tmp_path / "run", own_images)
    folder, before = own_images / split / "red", contents(run)
    if change == "added":
        shutil.copy(folder / "0.png", folder / "new.png")
        name = "red/new.png"
    elif change == "removed":
        (folder / "0.png").unlink()
        name = "red/0.png"
    else:
        name = replace(own_images, split)
    kind = {"train": "training", "val": "validation"}[split]
    with pytest.raises(UserError, match=rf"{kind} images: 1 {change}.*{name}.*--allow-changes"):
        fit(own_images, tiny_preset, run, baseline=True)
    assert contents(run) == before


def moved(run: Path, to: Path, images: Path) -> Path:
    """A copy of a finished run, as if it had been made of a copy of its images."""
    shutil.copytree(run, to)
    data = json.loads((to / "data.json").read_text())
    old = data["root"]
    for name in ("data.json", CONFIG):
        (to / name).write_text((to / name).read_text().replace(old, str(images)))
    return to


def test_changed_training_images_train_every_network_again(own_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    cache: dict[str, Any] = {"cache": tmp_path / "cache"}
    run = fit(own_images, tiny_preset, tmp_path / "run", overrides=ONE_EPOCH, **cache)
    replace(own_images, "train")
    listener = Stopper(lambda part, step: part == "teachers/inv")
    with pytest.raises(Interrupted):
        fit(own_images, tiny_preset, run, listener=listener, overrides=ONE_EPOCH, allow_changes=True, **cache)
    assert ("teachers/conv", 1) in listener.steps
    assert any(text.startswith("changed: training images: 1 replaced") for text in listener.said)
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "logits of the old images are gone"
    fit(own_images, tiny_preset, run, overrides=ONE_EPOCH, **cache)  # the change was allowed once
    new = fit(own_images, tiny_preset, tmp_path / "new", overrides=ONE_EPOCH, cache=tmp_path / "other")
    for part in ("teachers/conv", "teachers/inv", "students/advised-0"):
        assert_same_weights(weights_of(run, part), weights_of(new, part))
    assert records(run, "train", "eval", "result") == records(new, "train", "eval", "result")


def test_changed_validation_images_score_every_network_again(
    finished: Path, own_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = moved(finished, tmp_path / "run", own_images)
    (own_images / "val" / "red" / "0.png").unlink()
    listener = Stopper(never)
    fit(own_images, tiny_preset, run, baseline=True, allow_changes=True, listener=listener)
    assert listener.steps == [], "nothing is trained"
    assert records(run, "verdict")[-1]["images"] == 11
    assert len(records(run, "result")) == 4
    assert json.loads((run / "data.json").read_text())["splits"]["val"]["images"] == 11


def test_a_run_killed_while_it_discards_is_still_refused(
    finished: Path, own_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = moved(finished, tmp_path / "run", own_images)
    replace(own_images, "train")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coadvise.runs.run.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(own_images, tiny_preset, run, allow_changes=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match="1 replaced"):
        fit(own_images, tiny_preset, run)
    assert (run / PICTURES).read_text() == (finished / PICTURES).read_text()


# The disk


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    small_disk: Callable[[int], Path], tiny_images: Path, tiny_preset: str
) -> None:
    disk = small_disk(64 * 1024)
    with pytest.raises(UserError, match=r"\d+ kB a checkpoint, \d+ kB in all; 65\.5 kB are free"):
        fit(tiny_images, tiny_preset, disk / "run")
    assert list(disk.iterdir()) == []


def test_what_a_run_holds_already_counts(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(8 * MEGABYTE)
    (disk / "other").write_bytes(bytes(4 * MEGABYTE))
    with pytest.raises(UserError, match=r"2\.0 MB a checkpoint, 8\.0 MB in all; 4.* MB are free"):
        check_space(disk / "run", [2 * MEGABYTE, MEGABYTE, MEGABYTE], 1)
    (disk / "run").mkdir()
    (disk / "other").rename(disk / "run" / "model.safetensors")
    check_space(disk / "run", [2 * MEGABYTE, MEGABYTE, MEGABYTE], 1)
    with pytest.raises(UserError, match=r"11\.0 MB in all"):
        check_space(disk / "run", [2 * MEGABYTE, MEGABYTE, MEGABYTE], 2)
    assert sum(file.stat().st_size for file in disk.rglob("*") if file.is_file()) == 4 * MEGABYTE


def test_a_read_only_disk_is_named(small_disk: Callable[[int], Path], tiny_images: Path, tiny_preset: str) -> None:
    disk = small_disk(MEGABYTE)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UserError, match=r"run': Read-only file system"):
        fit(tiny_images, tiny_preset, disk / "run")
    assert list(disk.iterdir()) == []


def started(data: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command("fit", data, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_a_full_disk_stops_the_run_which_continues_when_there_is_room(
    small_disk: Callable[[int], Path], tiny_images: Path, tiny_preset: str
) -> None:
    disk = small_disk(20 * MEGABYTE)
    overrides = ["teachers.conv.recipe.epochs=400", "--preset", tiny_preset, "--out", str(disk / "run")]
    process = started(tiny_images, *overrides)
    while not list((disk / "run" / "checkpoints").glob("*/step-*")) and process.poll() is None:
        time.sleep(0.01)
    with suppress(OSError):  # the run writes, too
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
    _, err = process.communicate(timeout=600)
    assert process.returncode == StorageError.exit_code == 74, err
    assert "No space left on device" in err
    assert len(err.splitlines()) == 1
    left = disk / "run" / "checkpoints" / "teachers.conv"
    assert [path for path in left.iterdir() if not path.name.startswith("step-")] == [], "no partial is left"
    whole = {path.name for path in left.iterdir()}
    assert whole
    (disk / "filler").unlink()
    rest = Stopper(lambda part, step: True)
    with pytest.raises(Interrupted):
        fit(tiny_images, tiny_preset, disk / "run", overrides=overrides[:1], listener=rest)
    assert rest.steps[0][1] == int(max(whole).removeprefix("step-")) + 1


def test_a_run_directory_that_vanishes_stops_the_run(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started(tiny_images, "teachers.conv.recipe.epochs=4000", "--preset", tiny_preset, "--out", str(run))
    while not (run / "checkpoints").exists() and process.poll() is None:
        time.sleep(0.01)
    run.rename(tmp_path / "moved")
    _, err = process.communicate(timeout=600)
    assert process.returncode == StorageError.exit_code, err
    assert "No such file or directory" in err.splitlines()[-1]
    assert not run.exists(), "half a run directory was made again"
