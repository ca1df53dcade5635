"""`coadvise plan`: what it refuses in one sentence, calibrations as files, and a small calibration."""

import json
import re
import shlex
from pathlib import Path

import pytest

from coadvise.cli import app
from coadvise.costs import ask, machine
from coadvise.costs.ask import question
from coadvise.costs.foresee import Question
from coadvise.costs.machine import Calibration
from coadvise.errors import UserError
from coadvise.runs.options import PlanOptions


@pytest.fixture
def file(calibration: Calibration, tmp_path: Path) -> Path:
    return machine.save(calibration, tmp_path / "made.json")


def test_a_calibration_is_kept_and_a_damaged_one_named(
    calibration: Calibration, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert machine.read(file) == calibration
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert machine.read() is None
    assert machine.read(machine.save(calibration)) == calibration == machine.read()
    rates = calibration.rates_of("float32", 2)
    assert calibration.rates_of("float32", 1).scale > rates.scale > calibration.rates_of("float32", 3).scale
    for text in ("{", "[]", '{"format": 2}', json.dumps({**json.loads(file.read_text()), "rates": {"x": {}}})):
        file.write_text(text)
        with pytest.raises(UserError, match="is no calibration"):
            machine.read(file)
    with pytest.raises(UserError, match="there is no calibration"):
        machine.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpu": "H101"}, "unknown GPU 'H101', did you mean 'H100'"),
        ({"gpu_tflops": 100.0}, "--gpu-tflops without --gpu-memory, --gpu-bandwidth"),
        ({"gpu_tflops": 100.0, "gpu_memory": 0.0, "gpu_bandwidth": 1.0}, "--gpu-memory 0"),
        ({"images": 0}, "--images 0; give 1 or more"),
        ({"images": None}, "give a preset and --images N"),
        ({"classes": 1}, "--classes 1"),
        ({"pixels": 4}, "a side has 8 to 1024 pixels"),
        ({"nodes": 0}, "--nodes 0"),
        ({"gpus": 2}, "has no GPU; name one: --gpu H100"),
        ({"gpu": "h100", "gpus": 0}, "--gpus 0"),
        ({"network": 0.0}, "--network 0"),
        ({"preset": "photo"}, "did you mean 'photos'"),
        ({"gpu": "h100", "calibration": "FILE"}, "leave out --gpu"),
        ({"calibration": None}, "has not been measured; run coadvise plan --calibrate"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    given: dict[str, object], said: str, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    own = {"calibration": None if {"gpu", "gpu_tflops"} & given.keys() else file}
    given = {key: file if value == "FILE" else value for key, value in given.items()}
    with pytest.raises(UserError) as error:
        question(PlanOptions.of(**{"preset": "photos", "images": 100, **own, **given}))
    assert said in str(error.value)


def test_the_command_and_those_of_the_page_ask_what_they_were_given(
    file: Path, tiny_preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Question] = []

    class DoneError(Exception):
        pass

    def stop(question: Question) -> None:
        asked.append(question)
        raise DoneError

    monkeypatch.setattr("coadvise.costs.foresee.foresee", stop)
    monkeypatch.setattr(ask, "read", lambda path: machine.read(file))  # as if this machine had been measured
    page = (Path(__file__).parents[2] / "docs/SCALE.md").read_text()
    lines = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^coadvise plan .*", page, re.M)]
    shown = [words for words in lines if "--calibrate" not in words]
    assert len(shown) >= 3
    for words in shown:
        with pytest.raises(DoneError):
            app(words, standalone_mode=False)
    asked.clear()
    some = ["--images", "24", "--classes", "3", "--pixels", "32", "--nodes", "2", "--network", "8", "--seeds", "2"]
    with pytest.raises(DoneError):
        app(["plan", tiny_preset, "student.recipe.epochs=7", *some, "--calibration", str(file)], standalone_mode=False)
    (found,) = asked
    assert (found.images, found.classes, found.config.data.image_size, found.nodes, found.seeds) == (24, 3, 32, 2, 2)
    assert (found.network, found.config.student.recipe.epochs, found.processes) == (1e9, 7, 2)
    with pytest.raises(UserError, match="--images N"):
        app(["plan", tiny_preset], standalone_mode=False)
