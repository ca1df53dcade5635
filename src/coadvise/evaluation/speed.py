"""How long calls take, measured in turns, and how many images a second finished networks answer for."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from coadvise.models.network import Network
from coadvise.training.engine import Engine


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    synchronise: Callable[[], None],
    enough_seconds: float = math.inf,
) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that a slow moment of the machine falls on all of them.

    One round more than `repeats` is run; the first warms up. After `enough_seconds` no further round is begun; there
    is always one beside the warm-up.
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
    image_size: int,
    engine: Engine,
    batch_size: int = 64,
    repeats: int = 15,
    enough_seconds: float = 20.0,
) -> dict[str, float]:
    """Medians of interleaved repeats on one random batch."""
    images = torch.rand(batch_size, 3, image_size, image_size, device=engine.device)
    images = images.contiguous(memory_format=engine.memory_format)

    def answer(network: Network) -> None:
        with engine.autocast():  # entered anew, as it keeps the weights that it casts
            network(images)

    calls = {name: partial(answer, network) for name, network in networks.items()}
    seconds = interleaved(calls, repeats, engine.synchronise, enough_seconds)
    return {name: round(batch_size / median, 1) for name, median in seconds.items()}
