"""Involution at RedNet-26's shapes against `F.unfold`, the usual way in PyTorch; and RedNet-26 against timm's ResNets.

Both operators get the same values in the layout that suits them: unfold contiguous tensors, ours what a channels-last
network hands it. The forward pass by itself is timed in inference mode, as the networks' is. On CUDA many calls are
captured as one graph, so that the device is timed and not Python. bfloat16 means bfloat16 tensors for the operators and
autocast for the networks, all of which are channels-last.

The floor of an operator is the longer of two times: the bytes that it must move (each input read once, each output
written once, forward and backward apart) at the bandwidth of a large copy, and its arithmetic at the speed of a large
matrix product, both measured in the same run; that of RedNet-26 is its arithmetic. The goal on CUDA is a share of the
copy's bandwidth.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coadvise.models  # noqa: F401  (registers RedNet-26)
from benchmarks.floor import copy_bandwidth, operations, peak_operations
from benchmarks.table import Row, Setting, Table, machine
from coadvise.evaluation.speed import interleaved
from coadvise.ops import involution2d

FORWARD, BOTH = "forward", "forward + backward"
BATCH_SIZE = {"cpu": 8, "cuda": 64}
GOALS = {"cpu": {FORWARD: 60.0, BOTH: 15.0}, "cuda": {FORWARD: 0.0, BOTH: 0.0}}
FLOORS, SHARE = 4, 60  # goals: how many times the floor on a CPU, percent of the copy's bandwidth on CUDA
CALLS = 20  # of an operator in a captured graph
STEPS = 5  # of a network on CUDA between two looks at the clock
PEERS = ("resnet26", "resnet50")
SIZE, CLASSES = 224, 1000


class Shape(NamedTuple):
    """`times` involutions of a network: channels in groups of 16, square input of `size`."""

    name: str
    channels: int
    size: int
    kernel: int
    stride: int
    times: int


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


class Work(NamedTuple):
    """What one pass must do at least."""

    bytes: int
    operations: int


def unfold_involution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """[B, C, H, W] and [B, G, K, K, h, w] to [B, C, h, w] by gathering every window first."""
    batch, groups, kernel, _, height, width = weight.shape
    windows = F.unfold(x, kernel, padding=(kernel - 1) // 2, stride=stride)
    windows = windows.view(batch, groups, -1, kernel * kernel, height, width)
    return (windows * weight.flatten(2, 3).unsqueeze(2)).sum(3).flatten(1, 2)


# ---- the operator ----


def job(
    operator: Callable[[Tensor, Tensor, int], Tensor], x: Tensor, weight: Tensor, stride: int, grad: Tensor | None
) -> Callable[[], object]:
    """A call to time; forward and backward when `grad`, the gradient of the output, is given."""
    if grad is None:
        return lambda: operator(x, weight, stride)
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return lambda: torch.autograd.grad(operator(x, weight, stride), (x, weight), grad)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """`CALLS` calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def in_turns(unfold: Callable[[], object], ours: Callable[[], object], setting: Setting) -> tuple[float, float]:
    """Seconds of each."""
    calls, done = {"unfold": unfold, "ours": ours}, 1
    if setting.device.type == "cuda":
        calls, done = {name: captured(call) for name, call in calls.items()}, CALLS
    seconds = interleaved(calls, setting.repeats, setting.synchronise)
    return seconds["unfold"] / done, seconds["ours"] / done


def measure(shape: Shape, batch: int, setting: Setting) -> dict[str, tuple[float, float, Work]]:
    """By pass: seconds of `F.unfold`, seconds of ours, and what there is to do."""
    size, groups, dtype = -(-shape.size // shape.stride), shape.channels // 16, setting.dtype
    x = torch.randn(batch, shape.channels, shape.size, shape.size).to(setting.device, dtype)
    pixels = torch.randn(batch, size, size, groups, shape.kernel, shape.kernel).to(setting.device, dtype)
    grad = torch.randn(batch, shape.channels, size, size).to(setting.device, dtype)
    weight = pixels.permute(0, 3, 4, 5, 1, 2)
    last = torch.channels_last
    ours = x.contiguous(memory_format=last), weight, shape.stride
    peers = x, weight.contiguous(), shape.stride
    with torch.inference_mode():
        forward = in_turns(job(unfold_involution, *peers, None), job(involution2d, *ours, None), setting)
    passes = job(unfold_involution, *peers, grad), job(involution2d, *ours, grad.contiguous(memory_format=last))
    moved = (x.numel() + weight.numel() + grad.numel()) * dtype.itemsize
    # Backward reads x, weight and the output's gradient, and writes two gradients: two products instead of one.
    both = Work(3 * moved - grad.numel() * dtype.itemsize, 6 * grad.numel() * shape.kernel**2)
    return {
        FORWARD: (*forward, Work(moved, 2 * grad.numel() * shape.kernel**2)),
        BOTH: (*in_turns(*passes, setting), both),
    }


def operator_rows(batch: int, setting: Setting, bandwidth: float, peak: float) -> tuple[list[Row], list[str]]:
    """A row a shape and pass, the sums over the network, and what they are of the floor and of the bandwidth."""
    where = setting.device.type
    rows, totals, moved = [], {FORWARD: [0.0] * 3, BOTH: [0.0] * 3}, {FORWARD: 0, BOTH: 0}
    for shape in REDNET26:
        for direction, (unfold, ours, work) in measure(shape, batch, setting).items():
            figures = (unfold, ours, max(work.bytes / bandwidth, work.operations / peak))
            rows.append(milliseconds(f"{shape.name}, {direction}", figures))
            totals[direction] = [a + shape.times * b for a, b in zip(totals[direction], figures, strict=True)]
            moved[direction] += shape.times * work.bytes
    notes = [f"measured: copy {bandwidth / 1e9:.1f} GB/s, matrix product {peak / 1e9:.0f} GFLOP/s"]
    for direction, total in totals.items():
        rows.append(milliseconds(f"all of RedNet-26, {direction}", total, GOALS[where][direction]))
        if where == "cuda":
            share = 100 * moved[direction] / total[1] / bandwidth
            notes.append(f"{direction}: {share:.0f} % of the copy's bandwidth (goal {SHARE} %)")
        else:
            notes.append(f"{direction}: {total[1] / total[2]:.1f} times the floor (goal: at most {FLOORS})")
    return rows, notes


def milliseconds(name: str, seconds: Sequence[float], goal: float = 0.0) -> Row:
    unfold, ours, floor = (1e3 * s for s in seconds)
    return Row(name, "ms", ours, unfold, floor, goal)


# ---- the network ----


def network_step(name: str, training: bool, images: Tensor, setting: Setting) -> Callable[[], object]:
    """A forward pass in inference mode, or a training step, of timm's model of that name."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=CLASSES).to(setting.device).train(training)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = torch.compile(model) if setting.compile else model
    labels = torch.arange(len(images), device=setting.device) % CLASSES
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.precision == "bfloat16"):
            logits = forward(images)
        if training:
            F.cross_entropy(logits.float(), labels).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    times = STEPS if setting.device.type == "cuda" else 1

    def turn() -> None:
        with torch.inference_mode(not training):
            for _ in range(times):
                step()

    return turn


def network_rows(batch: int, setting: Setting, peak: float) -> list[Row]:
    images = torch.randn(batch, 3, SIZE, SIZE, device=setting.device).contiguous(memory_format=torch.channels_last)
    done = batch * (STEPS if setting.device.type == "cuda" else 1)
    rows, ours = [], timm.create_model("rednet26", num_classes=CLASSES)
    for training in (False, True):
        floor = peak / operations(ours, SIZE, backward=training)
        calls = {name: network_step(name, training, images, setting) for name in ("rednet26", *PEERS)}
        seconds = interleaved(calls, setting.repeats, setting.synchronise)
        for peer in PEERS:
            name = f"RedNet-26 against timm's {peer}, {'training' if training else 'inference'}"
            rows.append(Row(name, "images/s", done / seconds["rednet26"], done / seconds[peer], floor))
    return rows


def run(setting: Setting) -> Table:
    """Times the operator at every shape, then the networks."""
    torch.manual_seed(0)
    batch = setting.batch_size or BATCH_SIZE[setting.device.type]
    bandwidth, peak = copy_bandwidth(setting), peak_operations(setting)
    rows, notes = operator_rows(batch, setting, bandwidth, peak)
    rows += network_rows(batch, setting, peak)
    about = {**machine(setting), "batch": batch, "pixels": SIZE, "layout": "channels-last"}
    return Table("involution against F.unfold, RedNet-26 against ResNets", "peer", rows, about, notes)
