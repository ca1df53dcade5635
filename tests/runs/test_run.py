"""The run directory: another configuration, a second program, a disk that is too small or cannot be written."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import Stopper, command, contents, records

from coadvise import fit
from coadvise.config import EngineConfig, differences, load_config
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.errors import Interrupted, StorageError, UserError
from coadvise.runs.run import CONFIG, check_folder, check_images, check_space, owned
from coadvise.training.engine import Engine
from coadvise.training.metrics import read_records

MEGABYTE = 1_000_000


def test_a_record_has_a_command_that_a_shell_takes(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/coadvise/__main__.py", "fit", "my photos", "data.classes=[cat, dog]"])
    run = stopped(tiny_images, tiny_preset, tmp_path / "run")
    assert next(iter(read_records(run)))["command"] == "coadvise fit 'my photos' 'data.classes=[cat, dog]'"


# Another configuration


def stopped(data: Path, preset: str, run: Path, *overrides: str) -> Path:
    """A run whose first network has taken three steps."""
    with pytest.raises(Interrupted):
        fit(data, preset, run, overrides=overrides, listener=Stopper(lambda part, step: step == 3))
    return run


def test_keys_that_change_no_number_may_differ(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    run = stopped(tiny_images, tiny_preset, tmp_path / "run")
    other = Stopper(lambda part, step: True)
    with pytest.raises(Interrupted, match="stopped at step 1 of 4 of teachers/inv"):
        fit(tiny_images, tiny_preset, run, overrides=["data.workers=2", "engine.timeout_seconds=60"], listener=other)
    assert other.steps == [("teachers/conv", 4), ("teachers/inv", 1)]
    changes = ["data.workers: 0 -> 2", "engine.timeout_seconds: 600.0 -> 60.0"]
    assert [text for text in other.said if text.startswith("changed")] == [f"changed: {line}" for line in changes]
    assert [r["changed"] for r in records(run, "run")] == [[], changes]


def test_a_changed_configuration_goes_on_where_it_is_allowed(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run, slower = stopped(tiny_images, tiny_preset, tmp_path / "run"), "teachers.conv.recipe.learning_rate=0.0001"
    before = contents(run)
    with pytest.raises(UserError, match=r"conv\.recipe\.learning_rate: 0\.001 -> 0\.0001; .*--allow-changes to go on"):
        fit(tiny_images, tiny_preset, run, overrides=[slower])
    assert contents(run) == before
    rest = Stopper(lambda part, step: part == "teachers/inv")
    with pytest.raises(Interrupted):
        fit(tiny_images, tiny_preset, run, overrides=[slower], allow_changes=True, listener=rest)
    assert rest.steps[0] == ("teachers/conv", 4)
    wanted = load_config(tiny_preset, [slower], source=str(tiny_images))
    assert check_folder(run, wanted, allow_changes=False) == [], "config.yaml says what is done from now on"
    assert records(run, "run")[-1]["changed"] == ["teachers.conv.recipe.learning_rate: 0.001 -> 0.0001"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("teachers.conv.model_kwargs.widths=[8, 24]", r"teachers/conv: '.*step-00000003' is of another network"),
        ("teachers.conv.recipe.epochs=1", "teachers/conv is at step 3, and would end at 2; give it more epochs"),
    ],
)
def test_a_change_that_no_checkpoint_fits_is_refused(
    override: str, says: str, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = stopped(tiny_images, tiny_preset, tmp_path / "run")
    with pytest.raises(UserError, match=says):
        fit(tiny_images, tiny_preset, run, overrides=[override], allow_changes=True)
    assert list((run / "checkpoints" / "teachers.conv").iterdir()), "its checkpoints are left as they are"


@pytest.mark.parametrize("text", ["", "a: [", "\x00", "seed: 0", "unknown: 3", "- 1"])
def test_a_configuration_that_cannot_be_read_is_named(text: str, tiny_preset: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml' is damaged or another version's: .*restore it, or choose"):
        check_folder(tmp_path, load_config(tiny_preset), allow_changes=True)


def test_keys_that_change_numbers_are_refused(tiny_preset: str, tmp_path: Path) -> None:
    config = load_config(tiny_preset)
    (tmp_path / CONFIG).write_text(config.to_yaml())
    for override in (
        "seed=1",
        "data.image_size=32",
        "student.weight=2",
        "augment.flip=false",
    ):
        changed = load_config(tiny_preset, [override])
        with pytest.raises(UserError, match=differences(config, changed)[0].replace(".", r"\.")):
            check_folder(tmp_path, changed, allow_changes=False)


# One program at a time


HOLDER = """
import sys, time
from pathlib import Path
from coadvise.config import EngineConfig
from coadvise.engine import Engine
from coadvise.run import owned
with owned(Path(sys.argv[1]), Engine(EngineConfig(device="cpu"))):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_owner_is_named_and_a_dead_one_s_lock_is_taken_over(tmp_path: Path) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        says = rf"is in use by process {holder.pid} on {os.uname().nodename}; wait for it, or choose another --out"
        with pytest.raises(UserError, match=says), owned(tmp_path, engine):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with owned(tmp_path, engine):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"


def test_what_a_dead_program_left_behind_is_waited_for(tmp_path: Path) -> None:
    """Its loader processes have the lock until they notice."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = (tmp_path / ".lock").open("w")
    left.write(f"process {dead.pid} on {os.uname().nodename}")
    left.flush()
    fcntl.flock(left, fcntl.LOCK_EX)
    threading.Timer(0.5, left.close).start()
    with owned(tmp_path, Engine(EngineConfig(device="cpu"))):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"


def test_a_run_that_was_killed_while_it_began_can_be_begun(tiny_preset: str, tmp_path: Path) -> None:
    for name in (".lock", f".{CONFIG}.part"):
        (tmp_path / name).touch()
    assert check_folder(tmp_path, load_config(tiny_preset, source="x"), allow_changes=False) == []


def test_images_that_change_under_a_run_are_found_by_its_processes(
    finished: Path, tiny_images: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_images, tmp_path / "data"))
    check_images(finished, scan(open_source(data, 0.2, 0), 16, in_memory=True), 16)
    (data / "train" / "red" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"the images changed since .* began: 23 to train on, 12 to score can be read"):
        check_images(finished, scan(open_source(data, 0.2, 0), 16, in_memory=True), 16)


# The disk


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    small_disk: Callable[[int], Path], tiny_images: Path, tiny_preset: str
) -> None:
    disk = small_disk(64 * 1024)
    with pytest.raises(
        UserError, match=r"needs 0\.\d+ MB a checkpoint, 0\.\d+ MB in all; 0\.0655 MB are free on its disk"
    ):
        fit(tiny_images, tiny_preset, disk / "run")
    assert list(disk.iterdir()) == []


def test_what_a_run_holds_already_counts(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(8 * MEGABYTE)
    (disk / "other").write_bytes(bytes(4 * MEGABYTE))
    with pytest.raises(UserError, match=r"needs 2 MB a checkpoint, 8 MB in all; 4.* MB are free"):
        check_space(disk / "run", [2 * MEGABYTE, MEGABYTE, MEGABYTE], 1)
    (disk / "run").mkdir()
    (disk / "other").rename(disk / "run" / "model.safetensors")
    check_space(disk / "run", [2 * MEGABYTE, MEGABYTE, MEGABYTE], 1)
    with pytest.raises(UserError, match="11 MB in all"):
        check_space(disk / "run", [2 * MEGABYTE, MEGABYTE, MEGABYTE], 2)
    assert sum(file.stat().st_size for file in disk.rglob("*") if file.is_file()) == 4 * MEGABYTE


def test_a_read_only_disk_is_said(small_disk: Callable[[int], Path], tiny_images: Path, tiny_preset: str) -> None:
    disk = small_disk(MEGABYTE)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UserError, match=r"cannot write to '.*run': Read-only file system; make it writable, or choose"):
        fit(tiny_images, tiny_preset, disk / "run")
    assert list(disk.iterdir()) == []


def fill(disk: Path) -> None:
    """Leaves 8 KB."""
    with suppress(OSError):  # the run writes, too
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))


def test_a_disk_that_fills_up_stops_the_run_which_goes_on_when_there_is_room(
    small_disk: Callable[[int], Path], tiny_images: Path, tiny_preset: str
) -> None:
    disk = small_disk(20 * MEGABYTE)
    overrides = ["teachers.conv.recipe.epochs=400", "--preset", tiny_preset, "--out", str(disk / "run")]
    process = subprocess.Popen(
        command("fit", tiny_images, *overrides), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not list((disk / "run" / "checkpoints").glob("*/step-*")) and process.poll() is None:
        time.sleep(0.01)
    fill(disk)
    _, err = process.communicate(timeout=600)
    assert process.returncode == StorageError.exit_code == 74, err
    assert "No space left on device" in err
    assert "what was saved before is whole" in err
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
    slow = ["teachers.conv.recipe.epochs=4000", "--preset", tiny_preset, "--out", str(run)]
    process = subprocess.Popen(
        command("fit", tiny_images, *slow), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (run / "checkpoints").exists() and process.poll() is None:
        time.sleep(0.01)
    run.rename(tmp_path / "moved")
    _, err = process.communicate(timeout=600)
    assert process.returncode == StorageError.exit_code, err
    assert "No such file or directory" in err.splitlines()[-1]
    assert not run.exists(), "half a run directory was made again"
