"""Timing of calls in turns, and the inference speed of networks."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from coadvise.config.schema import ImageSize, sides
from coadvise.models.network import Network
from coadvise.training.engine import Engine


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    synchronise: Callable[[], None],
    enough_seconds: float = math.inf,
) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that a slow moment of the machine affects all of them.

    There is one more round than `repeats`; the first warms up. No round starts after `enough_seconds`, but there is
    always one after the warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() - began > enough_seconds:
            break
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.inference_mode()
def images_per_second(
    networks: Mapping[str, Network],
    image_size: ImageSize,
    engine: Engine,
    batch_size: int = 64,
    repeats: int = 15,
    enough_seconds: float = 20.0,
) -> dict[str, float]:
    """Inference speed of each network on one random batch, the median of interleaved repeats."""
    images = torch.rand(batch_size, 3, *sides(image_size), device=engine.device)
    images = images.contiguous(memory_format=engine.memory_format)

    def infer(network: Network) -> None:
        with engine.autocast():  # entered for each batch, since it caches the weights it casts
            network(images)

    calls = {name: partial(infer, network) for name, network in networks.items()}
    seconds = interleaved(calls, repeats, engine.synchronise, enough_seconds)
    return {name: round(batch_size / median, 1) for name, median in seconds.items()}
