"""What one rank of very many holds and does in a step, at 1.28 million pictures x 300 epochs and at a billion.

`python -m benchmarks.scale [--json FILE]`. Each case is a process of its own that holds no pixels and trains nothing.
It asks the training loader's own sampler for what a rank's steps need, and looks these pictures up in an index on disk.
1,024 ranks share a step of 65,536 pictures. Steps are taken all over the training, in order.

    sampler    the rows of a step's pictures and of those they are mixed with (`data/loader.py`, `data/views.py`)
    index      their labels and the scan's row of each, from files mapped into memory. The files are sparse: as long as
               the real ones, and read as zeros, so a disk's own time is not in it
    cache      what an epoch of two teachers' logits takes in a process, in the form of `distill/logit_cache.py`

Memory is the anonymous memory that the process gained, at its peak over all steps; pages of mapped files are not in it,
since the system takes them back when it needs them. A step's time is a median; an epoch's first step, which may make
that epoch's order, is apart.
"""

import argparse
import json
import mmap
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import coadvise.torchvision_guard  # noqa: F401
from coadvise.config.schema import AugmentConfig
from coadvise.data.loader import TrainingLoader
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources.folder import FolderSplit
from coadvise.data.store import table_bytes
from coadvise.data.views import Views
from coadvise.distill.logit_cache import Form

RANKS, BATCH, TEACHERS, CLASSES, TOP_K = 1024, 65_536, 2, 1000, 32
CASES = ((1_281_167, 300), (14_197_122, 90), (1_000_000_000, 2))  # pictures, epochs
STEPS = 600  # taken of each case
ROW = table_bytes(1)


def simulate(pictures: int, epochs: int, steps: int, folder: Path) -> dict[str, Any]:
    """One rank's steps."""
    labels = _sparse(folder / "labels", np.dtype(np.int64), pictures)
    table = _sparse(folder / "table", np.dtype((np.void, ROW)), pictures)
    split = ScannedSplit(FolderSplit(Path(), (), labels), labels, None, (), Counter())
    views = Views(split, AugmentConfig(kind="light", mixup=0.8), CLASSES, 32, seed=0)
    loader = TrainingLoader(views, BATCH, rank=RANKS // 2, processes=RANKS)
    before, peak = _anonymous(), 0
    starts, seconds = [], []
    last = -1
    for step in _places(epochs, loader.steps_per_epoch, steps):
        epoch = step // loader.steps_per_epoch
        began = time.process_time()
        (request,) = requests(loader, step)
        _ = labels[request.rows], table[request.rows]
        (starts if epoch != last else seconds).append(time.process_time() - began)
        last = epoch
        peak = max(peak, _anonymous() - before)
    return {
        "pictures": pictures, "epochs": epochs, "steps": loader.steps_per_epoch * epochs, "taken": steps,
        "views": len(request.rows), "step_ms": 1e3 * median(seconds), "epoch_start_ms": 1e3 * median(starts),
        "memory_mb": peak / 1e6, "cache_mb": pictures * TEACHERS * Form(CLASSES, TOP_K).bytes_an_answer / 1e6,
    }  # fmt: skip


def requests(loader: TrainingLoader, step: int) -> Iterator[Any]:
    """What the sampler gives a rank for one step."""
    from coadvise.data.loader import _Requests

    return iter(_Requests(loader, step, step + 1))


def _places(epochs: int, per_epoch: int, steps: int) -> list[int]:
    """Steps all over the training, several of an epoch one after the other, in order."""
    some = min(epochs, steps // 2)
    rounds = np.linspace(0, epochs, some, endpoint=False).astype(int)
    within = np.linspace(0, per_epoch, min(per_epoch, steps // some), endpoint=False).astype(int)
    return [int(epoch * per_epoch + place) for epoch in rounds for place in within]


def _sparse(path: Path, kind: "np.dtype[Any]", length: int) -> Any:
    with path.open("wb") as file:
        file.truncate(kind.itemsize * length)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # a picture's row, and not its neighbours
    return np.frombuffer(mapped, kind)


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """As docs/SCALE.md has them."""
    yield "| pictures | epochs | a step | an epoch's first step | memory of a rank | an epoch of two teachers' logits |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for one in found:
        yield (
            f"| {one['pictures']:,} | {one['epochs']} | {one['step_ms']:.2f} ms | {one['epoch_start_ms']:.1f} ms | "
            f"{one['memory_mb']:.1f} MB | {one['cache_mb']:,.0f} MB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--case", type=int, nargs=2, help="pictures and epochs: this one alone, as JSON")
    given = parser.parse_args()
    if given.case:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(simulate(*given.case, given.steps, Path(folder))))
        return
    found = []
    for pictures, epochs in CASES:
        words = [
            sys.executable,
            "-m",
            "benchmarks.scale",
            "--steps",
            str(given.steps),
            "--case",
            str(pictures),
            str(epochs),
        ]
        found.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    print("\n".join(lines(found)))
    if given.json is not None:
        given.json.write_text(json.dumps({"ranks": RANKS, "batch": BATCH, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
