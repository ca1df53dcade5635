"""Times the networks of the preset small-images with memory kept between steps, and as glibc does by itself.

    python benchmarks/allocator.py                         bfloat16, batch 64, one thread
    python benchmarks/allocator.py --precision float32

What is kept is set once in a process (`coadvise.memory.keep_freed_memory`), so each figure comes from a process of its
own; the two kinds take turns, and the median of each is shown, in images a second of processor time. The question and
what came of it: docs/LOG.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

BATCH_SIZE = 64
ROWS = ("conv teacher answers", "inv teacher answers", "student's step", "aligned student's step")


def measure(kept: bool, precision: str) -> dict[str, float]:
    """Images a second of each row, in this process."""
    import torch

    from coadvise.training import engine

    if not kept:
        engine.keep_freed_memory = lambda: False
    from benchmarks.step import CLASSES, SIZE, student
    from coadvise.config import EngineConfig, load_config
    from coadvise.distill.teachers import Teacher
    from coadvise.models.network import build_network

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = load_config("small-images")
    home = engine.Engine(EngineConfig(device="cpu", precision=precision))
    images = torch.rand(BATCH_SIZE, 3, SIZE, SIZE).contiguous(memory_format=home.memory_format)
    found = {}
    for name, row in zip(config.teachers, ROWS, strict=False):
        teacher = Teacher(name, build_network(config.teachers[name], CLASSES, SIZE, 0), CLASSES)
        home.prepare(teacher)
        found[row] = _rate(lambda teacher=teacher: _answer(teacher, images, home))
    for name, row in zip(("cit_micro_patch4_32", "cit_micro_aligned_patch4_32"), ROWS[2:], strict=True):
        network = student(name, advised=True).train()
        home.prepare(network)
        found[row] = _rate(lambda network=network: _learn(network, images, home))
    return found


def _answer(teacher, images, home) -> None:
    with home.autocast():
        teacher(images)


def _learn(network, images, home) -> None:
    with home.autocast():
        answers = network(images)
    sum(logits.float().logsumexp(-1).mean() for logits in answers.values()).backward()
    network.zero_grad(set_to_none=True)


def _rate(call: Callable[[], None]) -> float:
    seconds = []
    for turn in range(13):
        began = time.process_time()
        call()
        if turn >= 3:
            seconds.append(time.process_time() - began)
    return BATCH_SIZE / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--in-this-process", choices=("kept", "given-back"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_this_process:
        print(json.dumps(measure(arguments.in_this_process == "kept", arguments.precision)))
        return
    found: dict[str, list[dict[str, float]]] = {"given-back": [], "kept": []}
    for _ in range(arguments.repeats):
        for kind, rates in found.items():
            command = [sys.executable, __file__, "--precision", arguments.precision, "--in-this-process", kind]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rates.append(json.loads(out.splitlines()[-1]))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.precision}, batch {BATCH_SIZE}, one thread")
    print(f"{'images/s of processor time':26}{'given back':>12}{'kept':>8}{'ratio':>7}")
    for row in ROWS:
        before, after = (statistics.median(rates[row] for rates in found[kind]) for kind in found)
        print(f"{row:26}{before:12.0f}{after:8.0f}{after / before:7.2f}")


if __name__ == "__main__":
    main()
