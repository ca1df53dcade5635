"""Measures this machine for plans, in about two minutes: steps of a few networks, operation by operation, and views.

The networks are none of a preset's, at other sizes, so that a plan for a preset is foreseen and not looked up.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from coadvise.config.schema import AugmentConfig, ModelConfig, RecipeConfig
from coadvise.costs import machine
from coadvise.costs.count import Counted, Tally
from coadvise.costs.machine import HALF, SINGLE, Calibration
from coadvise.costs.rates import Rates, Timed, fit
from coadvise.costs.step import LAYOUT, TrainingStep
from coadvise.data.scan import presized_split, scan_split
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.machine import available_cores, keep_freed_memory
from coadvise.models.network import build_network

_CLASSES = [str(number) for number in range(10)]
_TOKENS = ("conv", "inv")
NETWORKS: tuple[tuple[str, dict[str, Any], tuple[str, ...] | None], ...] = (
    ("resnet_small", {"widths": [48, 96, 192], "depths": [1, 1, 1], "strides": [2, 2, 2]}, None),
    ("resnet26", {}, None),
    ("rednet26", {}, None),
    ("rednet_small", {"widths": [64, 128, 256], "depths": [1, 1, 1], "strides": [2, 2, 2]}, None),
    ("deit_tiny_patch16_224", {"depth": 3}, None),
    (
        "cit_micro_aligned_patch4_32",
        {"patch_size": 8, "embed_dim": 96, "num_heads": 3, "depth": 3, "stem_strides": [2, 2]},
        _TOKENS,
    ),
)
SHAPES = ((48, 8), (48, 64), (96, 16), (160, 8))  # pixels a side, images of a batch
GPU_SHAPES = ((64, 32), (128, 64), (224, 64))
ALL_CORES, ALL_CORES_SHAPE = (0, 3, 5), (96, 16)  # of those, by which all threads are compared with one
STEP_SECONDS, FEWEST, TALLIES = 0.25, 2, 2  # so long, and so many times, a step is timed; its operations so many times
VIEW_SIDES, PRESIZE, PICTURES = (96, 224), 288, 24
_RECIPE = RecipeConfig(ema=0.999, clip=1.0)


def calibrate(say: Callable[[str], None] = lambda text: None) -> Calibration:
    """Measures this machine: its GPU if it has one, else its processor with one thread and with all."""
    name, gpu, memory = machine.this_device()
    if not gpu:
        keep_freed_memory()
    before = torch.get_num_threads()
    rates: dict[str, Rates] = {}
    try:
        for precision in precisions(gpu):
            say(f"measuring {name}: {precision}")
            torch.set_num_threads(before if gpu else 1)
            one = fit([*steps(precision == HALF, gpu)], overlapped=gpu)
            rates[precision if gpu else f"{precision}, 1"] = one
            if not gpu and (cores := available_cores()) > 1:
                torch.set_num_threads(cores)
                scale = _scale_of_all_cores(one, precision == HALF)
                if scale > one.scale:
                    say(f"{cores} threads were slower than one: something else uses the cores; measure again when idle")
                rates[f"{precision}, {cores}"] = replace(one, scale=min(scale, one.scale))
        say("measuring views on one core")
        torch.set_num_threads(1)
        views = {kind: line_through(seconds) for kind, seconds in view_seconds().items()}
    finally:
        torch.set_num_threads(before)
    return Calibration(name, gpu, memory, rates, views)


def precisions(gpu: bool) -> tuple[str, ...]:
    """Those that `engine.precision=auto` may mean here, and float32."""
    from coadvise.config.schema import EngineConfig
    from coadvise.training.engine import resolve_precision

    auto = resolve_precision(EngineConfig(precision="auto", device="cuda" if gpu else "cpu")).precision
    return (HALF, SINGLE) if auto == HALF else (SINGLE,)


def clock_of(gpu: bool, threads: int = 1) -> Callable[[], float]:
    """Seconds: of the device, awaited; of this process with one thread, whatever else runs; else those of the clock."""
    if gpu:

        def awaited() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return awaited
    return time.process_time if threads == 1 else time.perf_counter


def steps(half: bool, gpu: bool) -> Iterator[Timed]:
    """Steps of the networks, measured operation by operation."""
    clock = clock_of(gpu)
    for number in range(len(NETWORKS)):
        for side, images in GPU_SHAPES if gpu else SHAPES:
            step, batch = _step(number, side, images, half, gpu)
            seconds = best(lambda step=step, batch=batch: step(batch), clock)  # type: ignore[misc]
            tallies = []
            for _ in range(TALLIES):
                with Tally(clock) as tally:
                    step(batch)
                tallies.append(tally)
            first = tallies[0]
            times = zip(*([taken for _, _, taken in tally.single] for tally in tallies), strict=True)
            single = [(kind, work, min(taken)) for (kind, work, _), taken in zip(first.single, times, strict=True)]
            yield Timed(seconds, Counted(first.work, first.calls, 0, step.kept, step.gradients, step.buffers), single)


def best(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """The fastest of some calls, after one that does not count."""
    call()
    taken, began = list[float](), time.perf_counter()
    while len(taken) < FEWEST or time.perf_counter() - began < STEP_SECONDS:
        start = clock()
        call()
        taken.append(clock() - start)
    return min(taken)


def _step(number: int, side: int, images: int, half: bool, gpu: bool) -> tuple[TrainingStep, torch.Tensor]:
    """One of the networks, ready to be trained, and a batch."""
    (model, arguments, tokens), device = NETWORKS[number], torch.device("cuda" if gpu else "cpu")
    network = build_network(ModelConfig(model=model, model_kwargs=arguments), _CLASSES, side, 0, tokens=tokens)
    network.to(device).to(memory_format=LAYOUT)  # type: ignore[call-overload]  # torch's stub leaves it out
    batch = torch.rand(images, 3, side, side, device=device).to(memory_format=LAYOUT)
    return TrainingStep(network, _RECIPE, half=half, plain=half and not gpu), batch


def _scale_of_all_cores(one: Rates, half: bool) -> float:
    """`Rates.scale` with all threads, by whole steps: how much faster the operations are, issuing them aside."""
    found = []
    for number in ALL_CORES:
        step, batch = _step(number, *ALL_CORES_SHAPE, half, gpu=False)
        seconds = best(lambda step=step, batch=batch: step(batch), time.perf_counter)  # type: ignore[misc]
        with Tally() as tally:
            step(batch)
        counted = Counted(tally.work, tally.calls, 0, 0, 0, 0)
        found.append(max(0.0, seconds - one.issuing(counted)) / sum(one.by_kind(counted).values()))
    return one.scale * statistics.median(found)


def view_seconds() -> dict[str, list[tuple[int, float]]]:
    """Pixels of a view and seconds of one core for it, by kind."""
    deit = AugmentConfig(kind="deit", erase=0.25, mixup=0.8, cutmix=1.0)
    light = AugmentConfig(kind="light", colour=0.1, mixup=0.8, cutmix=1.0)
    found: dict[str, list[tuple[int, float]]] = {"light": [], "deit": [], "presized": []}
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(_photographs(Path(folder, "pictures")))
        presized = presized_split(source, "train", PRESIZE, Path(folder, "store"), lambda text: None)
        for side in VIEW_SIDES:
            small = scan_split(source.train, side, in_memory=True)
            plain = scan_split(source.train, side, in_memory=False)
            for kind, split, augment in (
                ("light", small, light), ("deit", plain, deit), ("presized", presized, deit)
            ):  # fmt: skip
                views = Views(split, augment, 2, side, seed=0)
                found[kind].append((side * side, _seconds_a_view(views)))
    return found


def _seconds_a_view(views: Views) -> float:
    """Over two epochs: what a view takes depends on its draws."""
    rows = np.arange(len(views))
    views[0, rows]
    began = time.process_time()
    for epoch in (1, 2):
        views[epoch, rows]
    return (time.process_time() - began) / (2 * len(views))


def line_through(points: list[tuple[int, float]]) -> machine.Views:
    """Through two points, without negative parts."""
    (few, fast), (many, slow) = points
    pixel = max(0.0, (slow - fast) / (many - few))
    return machine.Views(max(0.0, fast - pixel * few), pixel)


def _photographs(folder: Path) -> Path:
    """Class folders of JPEGs of 500 x 375 pixels: parts of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images  # here: it takes a second to import

    originals = [Image.fromarray(image) for image in load_sample_images().images]  # 640 x 427
    for number in range(PICTURES + 4):
        split = "train" if number < PICTURES else "val"
        left, top = (17 * number) % 140, (11 * number) % 52
        path = folder / split / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        originals[number // 2 % 2].crop((left, top, left + 500, top + 375)).save(path, quality=90)
    return folder
