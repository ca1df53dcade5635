"""Times involution three ways: ``F.unfold`` (the usual way in torch), shift and accumulate, and the native kernel.

    python benchmarks/involution.py                        RedNet-26 at 224x224, batch 8
    python benchmarks/involution.py --shapes small         a small RedNet at 32x32, batch 128
    python benchmarks/involution.py --dtype bfloat16 --repeats 9

Each figure is a median over interleaved repeats, so that a slow moment of the machine falls on all of them. The floor
is the time a copy needs to move the bytes that the operator must move: each input read once, each output written once.
Unfold and reference get contiguous tensors, which suit them better, and the native kernel what a channels-last network
hands it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coadvise.ops import involution2d
from coadvise.ops.reference import involution2d_reference

FORWARD, BOTH = "forward", "forward + backward"
COLUMNS = ("unfold", "reference", "native", "floor")
Key = tuple[str, str]  # pass, implementation


class Shape(NamedTuple):
    """``repeats`` involutions of a network: channels in groups of 16, square input of ``size``."""

    name: str
    channels: int
    size: int
    kernel: int
    stride: int
    repeats: int


# Blocks (1, 2, 4, 1), the involution on a bottleneck's inner channels; the first of stages 2 to 4 has stride 2.
REDNET26 = (
    Shape("stem", 32, 112, 3, 1, 1),
    Shape("stage 1", 64, 56, 7, 1, 1),
    Shape("stage 2, first", 128, 56, 7, 2, 1),
    Shape("stage 2", 128, 28, 7, 1, 1),
    Shape("stage 3, first", 256, 28, 7, 2, 1),
    Shape("stage 3", 256, 14, 7, 1, 3),
    Shape("stage 4, first", 512, 14, 7, 2, 1),
)
SMALL = tuple(
    Shape(f"{c} x {s}x{s}, K={k}", c, s, k, 1, 1) for c, s in ((32, 32), (64, 16), (128, 8)) for k in (3, 5, 7)
)


def unfold_involution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """[B, C, H, W] and [B, G, K, K, h, w] to [B, C, h, w] by gathering every window first."""
    batch, groups, kernel, _, height, width = weight.shape
    windows = F.unfold(x, kernel, padding=(kernel - 1) // 2, stride=stride)
    windows = windows.view(batch, groups, -1, kernel * kernel, height, width)
    return (windows * weight.flatten(2, 3).unsqueeze(2)).sum(3).flatten(1, 2)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def job(
    operator: Callable[..., Tensor], x: Tensor, weight: Tensor, stride: int, grad: Tensor | None
) -> Callable[[], object]:
    """A call to time; forward and backward when ``grad``, the gradient of the output, is given."""
    if grad is None:
        return lambda: operator(x, weight, stride)
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return lambda: torch.autograd.grad(operator(x, weight, stride), (x, weight), grad)


def jobs_for(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[dict[Key, Callable[[], object]], dict[str, int]]:
    """The calls to time, and the bytes that each pass must move."""
    out_size, groups = -(-shape.size // shape.stride), max(1, shape.channels // 16)
    x = torch.randn(batch, shape.channels, shape.size, shape.size).to(dtype)
    weight = (
        torch.randn(batch, out_size, out_size, groups, shape.kernel, shape.kernel).to(dtype).permute(0, 3, 4, 5, 1, 2)
    )
    grad = torch.randn(batch, shape.channels, out_size, out_size).to(dtype)
    last, plain = torch.channels_last, torch.contiguous_format
    jobs: dict[Key, Callable[[], object]] = {}
    for name, operator, layout in (
        ("unfold", unfold_involution, plain),
        ("reference", involution2d_reference, plain),
        ("native", involution2d, last),
    ):
        inputs = x.contiguous(memory_format=layout), weight if layout is last else weight.contiguous(), shape.stride
        jobs[FORWARD, name] = job(operator, *inputs, None)
        jobs[BOTH, name] = job(operator, *inputs, grad.contiguous(memory_format=layout))
    moved = (x.numel() + weight.numel() + grad.numel()) * dtype.itemsize
    # Backward reads x, weight and the output's gradient, and writes two gradients.
    return jobs, {FORWARD: moved, BOTH: 3 * moved - grad.numel() * dtype.itemsize}


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes, best of a few."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(timed(lambda: target.copy_(source)) for _ in range(7))


def measure(shape: Shape, batch: int, dtype: torch.dtype, repeats: int, bandwidth: float) -> dict[Key, float]:
    """Seconds by pass and implementation, the floor among them."""
    jobs, moved = jobs_for(shape, batch, dtype)
    times: dict[Key, list[float]] = {key: [] for key in jobs}
    for call in jobs.values():
        call()  # builds the kernel, warms the allocator
    for _ in range(repeats):
        for key, call in jobs.items():
            times[key].append(statistics.median(timed(call) for _ in range(3)) if key[1] == "native" else timed(call))
    return {key: statistics.median(t) for key, t in times.items()} | {
        (d, "floor"): m / bandwidth for d, m in moved.items()
    }


def print_row(name: str, direction: str, seconds: dict[Key, float], scale: float = 1.0) -> None:
    unfold, reference, native, floor = (1e3 * scale * seconds[direction, column] for column in COLUMNS)
    figures = f"{unfold:>10.2f}{reference:>11.2f}{native:>9.3f}{floor:>9.3f}{unfold / native:>9.1f}x"
    print(f"{name:<22}{direction:<20}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=("rednet26", "small"), default="rednet26")
    parser.add_argument("--batch", type=int, help="images (default: 8, small: 128)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    shapes = REDNET26 if args.shapes == "rednet26" else SMALL
    batch, dtype = args.batch or (8 if shapes is REDNET26 else 128), getattr(torch, args.dtype)
    bandwidth = copy_bandwidth()
    print(
        f"torch {torch.__version__}, CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    print(f"batch {batch}, {args.dtype}, eager; copy bandwidth {bandwidth / 1e9:.1f} GB/s; times in ms a batch\n")
    print(f"{'shape':<22}{'pass':<20}{'unfold':>10}{'reference':>11}{'native':>9}{'floor':>9}{'speed-up':>10}")
    totals: dict[Key, float] = {}
    for shape in shapes:
        seconds = measure(shape, batch, dtype, args.repeats, bandwidth)
        for key, value in seconds.items():
            totals[key] = totals.get(key, 0.0) + shape.repeats * value
        for direction in (FORWARD, BOTH):
            print_row(shape.name, direction, seconds)
    if shapes is REDNET26:
        for direction in (FORWARD, BOTH):
            print_row("RedNet-26, an image", direction, totals, scale=1 / batch)


if __name__ == "__main__":
    main()
