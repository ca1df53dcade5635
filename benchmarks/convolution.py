"""The Winograd convolution of an aligned student's stems against PyTorch's: time, and rounding error of both.

Usage: python benchmarks/convolution.py [--threads 2] [--repeats 30]

Float32, channels-last; both take turns and times are medians. Errors are root mean squares against PyTorch's in
float64, relative to its answer's, of images after a ReLU, as the stems' are.
"""

import argparse
import statistics
import time

import coadvise  # noqa: F401  # isort: skip
import torch
from torch import Tensor
from torch.nn import functional as F

from coadvise.ops.convolution import conv3x3_relu, takes

SHAPES = ((4, 64, 64, 112), (4, 32, 64, 112), (64, 64, 64, 16))  # images, channels in and out, pixels a side


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1).relu_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads")
    for batch, inputs, outputs, side in SHAPES:
        x = torch.randn(batch, inputs, side, side).relu().contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5, torch.randn(outputs)
        if not takes(x, weight):
            raise SystemExit("no native kernel here: install gcc or clang")
        exact = plain(x.double(), weight.double(), bias.double())
        calls = {"PyTorch": plain, "Winograd": conv3x3_relu}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        with torch.inference_mode():
            for _ in range(args.repeats):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call(x, weight, bias)
                    seconds[name].append(time.perf_counter() - start)
        times = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = times["PyTorch"] / times["Winograd"]
        print(f"{batch} images, {inputs} to {outputs} channels, {side} pixels: {ratio:.2f} times as fast")
        for name, call in calls.items():
            error = ((call(x, weight, bias) - exact).square().mean() / exact.square().mean()).sqrt()
            print(f"  {name:10}{times[name] * 1e3:8.2f} ms, error {error:.2g}")


if __name__ == "__main__":
    main()
