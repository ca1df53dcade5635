"""The campaigns of `make chaos`, in short."""

import os
import subprocess
import sys
from pathlib import Path


def test_nothing_is_lost() -> None:
    """In a process of its own: the campaigns fork."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "chaos", "--tries", "3", "--seed", "1"]
    done = subprocess.run(arguments, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for campaign in ("kill", "corrupt"):
        assert f"{campaign}: tried 3, survived 3, lost 0 (" in done.stdout
