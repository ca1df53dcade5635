import json
from collections.abc import Callable
from pathlib import Path

import pytest
from made_run import make_run, one_hot, save

from coadvise.report.read import Run, read_run


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Builds a made run in the test's own folder."""

    def builder(name: str = "run", **options) -> Path:
        return make_run(tmp_path / name, **options)

    return builder


@pytest.fixture
def five(tmp_path: Path) -> Run:
    """Five images of three classes; the two teachers disagree on four of them."""
    labels = [0, 1, 2, 0, 1]
    save(tmp_path, "teachers/conv", labels, **{"class": one_hot([0, 1, 0, 2, 1], [5, 9, 5, 5, 1])})
    save(tmp_path, "teachers/inv", labels, **{"class": one_hot([1, 1, 2, 1, 0], [5, 9, 4, 6, 9])})
    tokens = {"class": [0, 1, 0, 0, 1], "conv": [0, 1, 0, 2, 1], "inv": [1, 1, 2, 1, 1]}
    save(tmp_path, "students/advised-0", labels, **{name: one_hot(classes, 3) for name, classes in tokens.items()})
    save(tmp_path, "students/advised-1", labels, **{"class": one_hot(labels, 3)})
    save(tmp_path, "students/alone-0", labels, **{"class": one_hot([2, 0, 2, 0, 0], 3)})
    (tmp_path / "data.json").write_text(json.dumps({"splits": {"val": {"paths": [f"{row}.png" for row in range(5)]}}}))
    return read_run(tmp_path)
