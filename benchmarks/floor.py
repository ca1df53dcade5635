"""What the machine allows at best: the speeds of a large copy and a large matrix product; and the work to be done."""

import copy
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.table import Setting


def best_seconds(call: Callable[[], object], setting: Setting) -> float:
    """The fastest of seven calls."""
    times = []
    for _ in range(7):
        setting.synchronise()
        start = time.perf_counter()
        call()
        setting.synchronise()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth(setting: Setting) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones((1 << 30) if setting.device.type == "cuda" else (64 << 20), dtype=torch.uint8)
    source = source.to(setting.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source), setting)


def peak_operations(setting: Setting) -> float:
    """Operations per second of a large matrix product, in the faster of float32 and the precision."""
    side = 8192 if setting.device.type == "cuda" else 2048
    rates = []
    for dtype in {torch.float32, setting.dtype}:
        matrix = torch.ones(side, side, dtype=dtype, device=setting.device)
        rates.append(2 * side**3 / best_seconds(lambda m=matrix: m @ m, setting))  # type: ignore[misc]
    return max(rates)


def operations(model: nn.Module, size: int, backward: bool = False) -> int:
    """Multiplications and additions for one image of `size` pixels a side, forward, or forward and backward.

    Counts matrix products, convolutions (by their definition) and involutions. Nothing is computed: a copy of the
    network is on PyTorch's meta device, where attention is two matrix products.
    """
    image = torch.empty(1, 3, size, size, device="meta")
    model = copy.deepcopy(model).to("meta").train(backward)
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        logits: torch.Tensor = model(image)
        if backward:
            logits.sum().backward()
    return int(counter.get_total_flops())


def product_note(peak: float) -> str:
    """A note for a table whose floors are arithmetic."""
    return f"measured: matrix product {peak / 1e9:.0f} GFLOP/s"
