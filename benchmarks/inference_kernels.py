"""The kernels that students answer with on a CPU against PyTorch's operators: time, and rounding error of both.

Usage: python benchmarks/inference_kernels.py [--threads 2] [--repeats 30]

The Winograd convolution of an aligned student's stems, and attention; float32. Both take turns and times are medians.
Errors are root mean squares against PyTorch's in float64, relative to its answer's. Images are as behind a ReLU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import coadvise  # noqa: F401  # isort: skip
import torch
from torch import Tensor
from torch.nn import functional as F

from coadvise.ops import attention, convolution

CONVOLUTIONS = ((4, 64, 64, 112), (4, 32, 64, 112), (64, 64, 64, 16))  # images, channels in and out, pixels a side
ATTENTIONS = ((4, 199, 6, 64), (8, 199, 3, 64), (64, 67, 3, 64))  # images, tokens, heads, width of a head

Call = Callable[..., Tensor]


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1).relu_()


def compare(name: str, plain: Call, ours: Call, repeats: int, *inputs: Tensor) -> None:
    calls = {"PyTorch": plain, "coadvise": ours}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for who, call in calls.items():
            start = time.perf_counter()
            call(*inputs)
            seconds[who].append(time.perf_counter() - start)
    times = {who: statistics.median(values) for who, values in seconds.items()}
    print(f"{name}: {times['PyTorch'] / times['coadvise']:.2f} times as fast")
    exact = plain(*(t.double() for t in inputs))
    for who, call in calls.items():
        error = ((call(*inputs) - exact).square().mean() / exact.square().mean()).sqrt()
        print(f"  {who:10}{times[who] * 1e3:8.2f} ms, error {error:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads")
    with torch.inference_mode():
        for batch, inputs, outputs, side in CONVOLUTIONS:
            x = torch.randn(batch, inputs, side, side).relu().contiguous(memory_format=torch.channels_last)
            weight, bias = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5, torch.randn(outputs)
            if not convolution.takes(x, weight):
                raise SystemExit("no native kernel here: install gcc or clang")
            name = f"convolution, {batch} images, {inputs} to {outputs} channels, {side} pixels"
            compare(name, plain_convolution, convolution.conv3x3_relu, args.repeats, x, weight, bias)
        for batch, tokens, heads, width in ATTENTIONS:
            qkv = torch.randn(batch, tokens, 3 * heads * width)
            if not attention.takes(qkv, heads):
                raise SystemExit("no native kernel here: install gcc or clang")
            name = f"attention, {batch} images, {tokens} tokens, {heads} heads of {width}"
            plain, ours = (partial(call, heads=heads) for call in (attention.plain, attention.attention))
            compare(name, plain, ours, args.repeats, qkv)


if __name__ == "__main__":
    main()
