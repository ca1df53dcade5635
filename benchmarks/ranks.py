"""A training step on one process and on two of this machine, and the bytes that a step sends.

`python -m benchmarks.ranks [--json FILE]`. `torchrun` starts one and two processes of one thread each. They train the
networks of the preset photos-small by the engine of `fit` (Fabric, DDP, gloo). Each has 32 images, so with two the work
doubles, and perfect scaling keeps the time. A communication hook of DDP counts the gradients' bytes; buffers are those
that DDP lists. `coadvise plan` foresees both (docs/SCALE.md).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

import coadvise.torchvision_guard  # noqa: F401
from coadvise.config.reading import load_config
from coadvise.costs.step import TrainingStep
from coadvise.runs.network_job import initial_network
from coadvise.runs.plan import ALONE, TEACHER, Part
from coadvise.training.engine import Engine
from coadvise.training.optim import clip_gradient, make_optimiser

PRESET, CLASSES, IMAGES, SKIP = "photos-small", 10, 32, 2
PARTS = (Part("conv", TEACHER, 0, "conv"), Part("inv", TEACHER, 0, "inv"), Part("student", ALONE, 0))


def rank(steps: int) -> dict[str, Any]:
    """What one process sees: by network, median seconds of a step and the bytes that are exchanged in one."""
    torch.set_num_threads(1)
    config = load_config(PRESET)
    found: dict[str, Any] = {}
    with Engine(config.engine) as engine:
        for part in PARTS:
            recipe = config.teachers[part.teacher].recipe if part.role == TEACHER else config.student.recipe
            network = initial_network(part, config, [str(number) for number in range(CLASSES)])
            engine.prepare(network)
            optimiser = make_optimiser(network.model, recipe)
            foreseen = TrainingStep(network, recipe)
            model, optimiser = engine.setup(network, optimiser)
            sent = [0]
            if engine.processes > 1:
                watch(model, sent)
            size = config.data.image_size
            images = torch.rand(IMAGES, 3, size, size).to(memory_format=engine.memory_format)
            times = []
            for _ in range(steps + SKIP):
                sent[0] = 0
                began = time.perf_counter()
                with engine.autocast():
                    answers = model(images)
                engine.backward(torch.stack([logits.float().logsumexp(-1).mean() for logits in answers.values()]).sum())
                clip_gradient(network, recipe.clip)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                times.append(time.perf_counter() - began)
            passed = model._forward_module.modules_buffers if engine.processes > 1 else ()  # what DDP passes on
            buffers = sum(buffer.nbytes for buffer in passed)
            found[part.name] = {
                "seconds": median(times[SKIP:]), "gradients": sent[0], "buffers": buffers,
                "foreseen_gradients": foreseen.gradients, "foreseen_buffers": foreseen.buffers,
            }  # fmt: skip
        main = engine.is_main
    return found if main else {}


def watch(model: torch.nn.Module, sent: list[int]) -> None:
    """Counts what DDP exchanges of gradients; the hook then does what DDP does without one."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP checks annotations and knows no other names
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    model._forward_module.register_comm_hook(None, hook)  # type: ignore[operator, union-attr]


def run(processes: int, steps: int) -> dict[str, Any]:
    """By network, as rank 0 saw it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [*launcher, "-m", "benchmarks.ranks", "--rank", "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def lines(one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    """As docs/SCALE.md has them."""
    yield "| network | a step on 1 process | on 2, twice the images | efficiency | gradients a step | buffers a step |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, alone in one.items():
        both = two[name]
        yield (
            f"| {name} | {1e3 * alone['seconds']:.0f} ms | {1e3 * both['seconds']:.0f} ms | "
            f"{alone['seconds'] / both['seconds']:.0%} | {both['gradients']:,} B | {both['buffers']:,} B |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rank", action="store_true", help="be one of the processes")
    given = parser.parse_args()
    if given.rank:
        if found := rank(given.steps):
            print(json.dumps(found), flush=True)
        return
    before = os.getloadavg()[0]
    one, two = run(1, given.steps), run(2, given.steps)
    print("\n".join(lines(one, two)))
    print(f"other work on the machine: load {before:.1f} at the beginning")
    if given.json is not None:
        given.json.write_text(json.dumps({"load": before, "images": IMAGES, "1": one, "2": two}, indent=1) + "\n")


if __name__ == "__main__":
    main()
