from collections.abc import Callable
from pathlib import Path

import pytest
from made_run import make_run


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Builds a made run in the test's own folder."""

    def builder(name: str = "run", **options) -> Path:
        return make_run(tmp_path / name, **options)

    return builder
