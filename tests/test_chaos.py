"""The campaigns of `make chaos`, in short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import CAMPAIGNS, Tally

# A program that does not look at checksums: what the campaign must call lost.
BLIND = """
import json, runpy, sys
from coadvise import storage as checkpoint
checkpoint.read_manifest = lambda folder: json.loads((folder / checkpoint.MANIFEST).read_text())
sys.argv = ["chaos", "corrupt", "--tries", "6"]
runpy.run_module("chaos", run_name="__main__")
"""


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: the campaigns fork."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(("name", "tries"), [("kill", 3), ("corrupt", 5), ("mutate", 60), ("fuzz", 60)])
def test_nothing_is_lost(name: str, tries: int) -> None:
    assert name in CAMPAIGNS
    done = python("-m", "chaos", name, "--tries", str(tries), "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{name}: tried {tries}, survived {tries}, lost 0 (")


def test_what_is_lost_is_seen() -> None:
    done = python("-c", BLIND)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "  lost: " in done.stdout
    assert str(Tally("x", 3, ["a"])) == "x: tried 3, survived 2, lost 1 ()\n  lost: a"
