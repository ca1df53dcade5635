"""What one rank of very many holds and does in a step, at 1.28 million pictures x 300 epochs and at a billion.

`python -m benchmarks.scale [--json FILE]`; `--plans` prints the table of plans for H100s in docs/SCALE.md instead. Each
case is a process of its own that holds no pixels and trains nothing. It asks the training loader's own sampler for what
a rank's steps need, and looks these pictures up in an index on disk.
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
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import coadvise.torchvision_guard  # noqa: F401
from coadvise.config.schema import AugmentConfig
from coadvise.costs.ask import question
from coadvise.costs.foresee import foresee
from coadvise.costs.gpus import gpu_named
from coadvise.costs.machine import of_sheet
from coadvise.costs.table import cells_of
from coadvise.data.loader import TrainingLoader
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources.folder import FolderSplit
from coadvise.data.store import table_bytes
from coadvise.data.views import Views
from coadvise.distill.logit_cache import Form
from coadvise.runs.options import PlanOptions

RANKS, BATCH, TEACHERS, CLASSES, TOP_K = 1024, 65_536, 2, 1000, 32
CASES = ((1_281_167, 300), (14_197_122, 90), (1_000_000_000, 2))  # pictures, epochs
STEPS = 600  # taken of each case
ROW = table_bytes(1)


def _trained(student: int, teacher: int, batch: int) -> tuple[str, ...]:
    """Epochs of both, and images of a step."""
    return tuple(
        f"{network}.recipe.{key}={value}"
        for network, epochs in (("student", student), ("teachers.inv", teacher))
        for key, value in (("epochs", epochs), ("batch_size", batch))
    )


# Of the preset imagenet1k: pictures, what differs from it, and the H100s.
_PARTS = ("student.recipe.accumulate=8", "teachers.inv.recipe.accumulate=8")
_LARGE = {"classes": 21_841, "network": 400.0}
PLANS: tuple[tuple[str, str, tuple[str, ...], dict[str, Any]], ...] = (
    ("ImageNet-1k", "1", _PARTS, {"images": 1_281_167, "gpus": 1}),
    ("ImageNet-1k", "8", (), {"images": 1_281_167, "gpus": 8}),
    ("ImageNet-1k", "64 on 8 nodes", (), {"images": 1_281_167, "gpus": 8, "nodes": 8}),
    ("ImageNet-21k", "64 on 8 nodes", _trained(90, 30, 4096), {"images": 14_197_122, "gpus": 8, "nodes": 8, **_LARGE}),
    ("a billion", "1,024 on 128 nodes", _trained(2, 1, 65_536), {"images": 10**9, "gpus": 8, "nodes": 128, **_LARGE}),
)


def plans() -> Iterator[str]:
    """What `coadvise plan` foresees of ImageNet-1k and more on H100s, as docs/SCALE.md has it."""
    yield (
        "| pictures | H100s | network | time | a step | images a process | memory | fit | loader cores a node | sent | "
        "held up by |"
    )
    yield "| " + " | ".join(["---"] * 11) + " |"
    for pictures, gpus, changes, given in PLANS:
        options = PlanOptions.of(preset="imagenet1k", overrides=("data.presize=288", *changes), gpu="H100", **given)
        asked = replace(question(options), target=of_sheet(gpu_named("H100"), None))  # without this machine's cores
        for one in foresee(asked).networks:
            cells = (pictures, gpus, one.part.title.removesuffix(" (seed 0)"), *cells_of(asked, one))
            yield f"| {' | '.join(cells)} |"


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
    parser.add_argument("--plans", action="store_true", help="print the table of plans")
    parser.add_argument("--case", type=int, nargs=2, help="pictures and epochs: this one alone, as JSON")
    given = parser.parse_args()
    if given.plans:
        print("\n".join(plans()))
        return
    if given.case:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(simulate(*given.case, given.steps, Path(folder))))
        return
    found = []
    for pictures, epochs in CASES:
        case = ["--steps", str(given.steps), "--case", str(pictures), str(epochs)]
        words = [sys.executable, "-m", "benchmarks.scale", *case]
        found.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    print("\n".join(lines(found)))
    if given.json is not None:
        given.json.write_text(json.dumps({"ranks": RANKS, "batch": BATCH, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
