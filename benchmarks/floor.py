"""What the machine allows at best: the speeds of a large copy and a large product, and the work that there is to do."""

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
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones((1 << 30) if setting.device.type == "cuda" else (64 << 20), dtype=torch.uint8)
    source = source.to(setting.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source), setting)


def peak_operations(setting: Setting) -> float:
    """Multiplications and additions a second of a large matrix product, in the faster of float32 and the precision."""
    side = 8192 if setting.device.type == "cuda" else 2048
    rates = []
    for dtype in {torch.float32, setting.dtype}:
        matrix = torch.ones(side, side, dtype=dtype, device=setting.device)
        rates.append(2 * side**3 / best_seconds(lambda m=matrix: m @ m, setting))  # type: ignore[misc]
    return max(rates)


def operations(model: nn.Module, size: int, backward: bool = False) -> int:
    """Multiplications and additions of one image of `size` pixels a side, forward, or forward and backward.

    Products of matrices, convolutions (direct ones, not Winograd's) and involutions are counted, nothing else. Nothing
    is computed: a copy of the network is on PyTorch's meta device, where attention is two matrix products.
    """
    image = torch.empty(1, 3, size, size, device="meta")
    model = copy.deepcopy(model).to("meta").train(backward)
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        answer: torch.Tensor = model(image)
        if backward:
            answer.sum().backward()
    return int(counter.get_total_flops())


def product_note(peak: float) -> str:
    """What the floors of networks rest on."""
    return f"measured: matrix product {peak / 1e9:.0f} GFLOP/s"
