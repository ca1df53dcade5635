"""How many images a second finished networks answer for."""

import statistics
import time
from collections.abc import Mapping

import torch

from coadvise.engine import Engine
from coadvise.networks import Network


@torch.inference_mode()
def images_per_second(
    networks: Mapping[str, Network],
    image_size: int,
    engine: Engine,
    batch_size: int = 64,
    repeats: int = 15,
    enough_seconds: float = 20.0,
) -> dict[str, float]:
    """Medians of interleaved repeats on one random batch, so that a slow moment of the machine hits all alike.

    After `enough_seconds` no further repeat is begun; there is always one beside the warm-up.
    """
    images = torch.rand(batch_size, 3, image_size, image_size, device=engine.device)
    images = images.contiguous(memory_format=engine.memory_format)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    began = time.perf_counter()
    for repeat in range(repeats + 1):  # the first is a warm-up
        if repeat > 1 and time.perf_counter() - began > enough_seconds:
            break
        for name, network in networks.items():
            engine.synchronise()
            start = time.perf_counter()
            with engine.autocast():
                network(images)
            engine.synchronise()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: round(batch_size / statistics.median(times), 1) for name, times in seconds.items()}
