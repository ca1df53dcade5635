"""The script that trains and runs all benchmarks on a GPU: which, how, what happens if one fails. No GPU is needed."""

import os
import subprocess
from pathlib import Path

from benchmarks import NAMES

from coadvise.config.reading import load_config

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
STAND_IN = """#!/bin/sh
echo "$@" >> "$CALLS"
for last; do :; done
if [ "$3" = "$FAILING" ]; then exit 2; fi
echo '{}' > "$last"
"""


def run_script(tmp_path: Path, failing: str = "") -> tuple[int, list[list[str]], set[str], str]:
    """Status, calls of `python`, files written and stderr, with a stand-in for `python`."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "CALLS": str(tmp_path / "calls"), "FAILING": failing}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True, check=False)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    return done.returncode, calls, {file.name for file in (tmp_path / "out").iterdir()}, done.stderr


def test_every_benchmark_runs_on_the_gpu_and_leaves_a_file(tmp_path: Path) -> None:
    status, (fit, *calls), files, _ = run_script(tmp_path)
    assert status == 0
    assert fit[:3] == ["-m", "coadvise", "fit"]
    load_config("photos", [word for word in fit if "=" in word])
    assert Path(fit[3]).is_dir()
    assert {call[2] for call in calls} == set(NAMES) - {
        "batch_norm",
        "export",
        "decode",
        "scan",
        "shards",
    }  # which run on CPUs alone
    assert all(call[:2] == ["-m", "benchmarks"] and "--device cuda" in " ".join(call) for call in calls)
    assert len(files) == len(calls) + 1
    both = {f"{n}-{p}.json" for n in ("involution", "step", "student", "cache") for p in ("float32", "bfloat16")}
    compiled = {f"{n}-{p}-compile.json" for n in ("step", "student") for p in ("float32", "bfloat16")}
    assert both | compiled <= files


def test_one_that_fails_is_named_and_does_not_stop_the_others(tmp_path: Path) -> None:
    status, calls, files, errors = run_script(tmp_path, failing="loader")
    assert status == 1
    assert "not done: loader-float32" in errors
    assert "checkpoint-float32.json" in files
    assert len(files) == len(calls) - 1
