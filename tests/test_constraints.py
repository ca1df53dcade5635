"""The files of versions against those that the package asks for."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import coadvise

ROOT = Path(__file__).parent.parent


def numbers(text: str) -> tuple[int, ...]:
    """Without the zeros at the end: 2.0 is 2."""
    parts = [int(part) for part in text.split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def test_the_oldest_versions_are_those_that_are_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(line for extra in ("heic", "onnx", "parquet") for line in project["optional-dependencies"][extra]),
    ]
    pinned = (ROOT / "constraints" / "oldest.txt").read_text()
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", pinned, re.MULTILINE))
    lowest = dict(match.groups() for line in asked if (match := re.match(r"([\w-]+)>=([\d.]+)", line)))
    assert len(lowest) == len(asked)
    assert {name: numbers(version) for name, version in oldest.items()} == {
        name: numbers(version) for name, version in lowest.items()
    }


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {coadvise.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == coadvise.__version__ == version("coadvise")
