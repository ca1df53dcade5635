"""`make chaos`, in short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_is_lost() -> None:
    """In a process of its own: the runs are forked."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("chaos.py")
    arguments = [sys.executable, script, "--tries", "3", "--seed", "1"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tried 3, lost 0" in done.stdout
