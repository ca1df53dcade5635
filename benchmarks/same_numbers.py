"""Records the numbers that five short runs make, to hold a change of the code against them, bit for bit.

    python benchmarks/same_numbers.py record before.json PHOTOS     # in the old checkout
    python benchmarks/same_numbers.py record after.json PHOTOS      # in the new one, same machine, same versions
    python benchmarks/same_numbers.py compare before.json after.json

PHOTOS is a folder with train/ and val/ or test/ of small photographs. The five: the digits with a baseline, small
photographs for two epochs, a run that is stopped and resumed, one with a logit cache, and a study. Each runs in one
thread from a fixed seed. What is kept: sha256 sums of weights and predictions, and every loss and score of the record.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

SHORT = [
    "teachers.conv.recipe.epochs=6",
    "teachers.inv.recipe.epochs=6",
    "student.recipe.epochs=12",
    "engine.checkpoint_seconds=0",
]
TWO_EPOCHS = ["teachers.conv.recipe.epochs=2", "teachers.inv.recipe.epochs=2", "student.recipe.epochs=2"]
NUMBERS = ("losses", "top1", "top5", "ece", "nll", "learning_rate", "step", "epoch", "part", "seed", "kind")


def coadvise(*arguments: str, stop_after: int | None = None) -> None:
    """Runs the command line of the checkout in PYTHONPATH; stops it as Ctrl-C does after so many records."""
    command = [sys.executable, "-m", "coadvise", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    if stop_after is not None:
        metrics = Path(arguments[arguments.index("--out") + 1], "metrics.jsonl")
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= stop_after):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    if process.wait() not in (0, 75):
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")


def tensors(path: Path) -> str:
    """A sum over names, shapes and bits of a safetensors file, whatever its header says."""
    whole = hashlib.sha256()
    for name, values in sorted(load_file(path).items()):
        whole.update(f"{name} {values.shape} {values.dtype}".encode() + values.tobytes())
    return whole.hexdigest()[:16]


def numbers(folder: Path) -> dict[str, Any]:
    """Everything below a run or a study that has to stay the same."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "logits" not in path.parts and "cache" not in path.parts:
            # Study folders are named by a hash of the configuration, which may gain keys.
            found[re.sub(r"[0-9a-f]{12}", "HASH", str(path.relative_to(folder))) + f" {tensors(path)}"] = True
    for path in sorted(folder.rglob("metrics.jsonl")):
        for record in map(json.loads, path.read_text().splitlines()):
            if record["kind"] in ("train", "eval", "result"):
                found[json.dumps({key: record[key] for key in NUMBERS if key in record}, sort_keys=True)] = True
    return found


def record(target: Path, photos: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        at = {name: str(Path(scratch, name)) for name in ("digits", "small", "resumed", "cached", "study")}
        coadvise("fit", "digits", "--baseline", "--out", at["digits"], *SHORT)
        coadvise("fit", photos, "--preset", "small-images", "--baseline", "--out", at["small"], *TWO_EPOCHS)
        for lines in (4, 20):
            coadvise("fit", "digits", "--out", at["resumed"], *SHORT, stop_after=lines)
        coadvise("fit", "digits", "--out", at["resumed"], *SHORT)
        coadvise("fit", "digits", "--out", at["cached"], "--cache", at["cached"] + "-logits", *SHORT)
        coadvise(
            "study", sys.argv[4] if len(sys.argv) > 4 else "table7", "--data", "digits", "--out", at["study"], *SHORT
        )
        target.write_text(json.dumps({name: numbers(Path(folder)) for name, folder in at.items()}, indent=1))


def compare(before: Path, after: Path) -> None:
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    different = 0
    for name in old:
        gone, fresh = sorted(old[name].keys() - new[name].keys()), sorted(new[name].keys() - old[name].keys())
        different += len(gone) + len(fresh)
        print(f"{name}: {len(old[name])} figures and files, {len(gone)} of them not there, {len(fresh)} new")
        for line in (*gone[:3], *fresh[:3]):
            print(f"  {line[:200]}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]), sys.argv[3])
    else:
        compare(Path(sys.argv[2]), Path(sys.argv[3]))
