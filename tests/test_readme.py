"""The README's commands run, and its Python does."""

import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import coadvise
from coadvise.config import load_config
from coadvise.data.sources import open_source

FEW_STEPS = [
    f"{network}.recipe.{key}=1"
    for network in ("teachers.conv", "teachers.inv", "student")
    for key in ("epochs", "evaluations")
]
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def _commands(first: str) -> list[list[str]]:
    """The README's `coadvise FIRST ...` lines as arguments, comments left out."""
    lines = "\n".join(_blocks("sh") + _blocks("text")).splitlines()
    found = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if re.search(r"coadvise ", line)]
    return [words[1:] for words in found if Path(words[0]).name == "coadvise" and words[1] == first]


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images the README names and the run its Python makes, trained for a few steps."""
    folder = tmp_path_factory.mktemp("readme")
    source = open_source("digits", 0.2, 0)
    for name in set(re.findall(r"\d{4}\.png", README)):
        shutil.copy(next(path for path in source.val.paths if path.name == name), folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(coadvise, "fit", functools.partial(coadvise.fit, overrides=FEW_STEPS))
        for block in _blocks("python"):
            exec(block, {})
    return folder


def test_python_leaves_a_report(beside: Path) -> None:
    assert (beside / "runs/demo/report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    "words", [w for first in ("cache", "evaluate", "predict", "models", "presets") for w in _commands(first)]
)
def test_commands_run(words: list[str], beside: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "coadvise", *words], cwd=beside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_fit_commands_parse() -> None:
    commands = [
        words for words in _commands("fit") if "student.recipe.epoch=3" not in words and "mine.yaml" not in words
    ]
    assert len(commands) >= 5
    for words in commands:
        load_config("small-images", [word for word in words[2:] if "=" in word])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z]+)", "\n".join(_blocks("sh")), re.M)) <= targets
