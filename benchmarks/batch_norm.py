"""Batch norm with the shortcut and the ReLU behind it as one operation, against PyTorch's three.

Rows are a forward and backward pass at shapes of the preset small-images, and an answer and a training step (forward,
cross-entropy, backward, fused AdamW, one fixed batch) of its teachers and its student, once with PyTorch's operations
and once with ours. Freed memory is kept, as in a training run. The floor of a shape is its bytes, each read or written
once, at the speed of a large copy; that of a network its arithmetic at the speed of a large matrix product. For CPUs:
on a GPU both sides would be PyTorch's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.floor import copy_bandwidth, operations, peak_operations
from benchmarks.table import Row, Setting, Table, machine
from coadvise.advice import CLASS
from coadvise.config.reading import load_config
from coadvise.evaluation.speed import interleaved
from coadvise.machine import keep_freed_memory
from coadvise.models.network import build_network
from coadvise.ops import batch_norm_relu
from coadvise.ops.batch_norm import switched_off
from coadvise.training.engine import plain_attention

BATCH_SIZE, SIZE, CLASSES = 64, 32, tuple(f"class {n}" for n in range(10))
SHAPES = ((16, 32), (64, 32), (192, 16), (256, 4))  # channels, pixels a side


def passes(channels: int, side: int, batch: int, setting: Setting) -> tuple[Callable[[], object], int]:
    """Forward and backward of what a block ends with, and the bytes that these read and write at least."""
    norm = nn.BatchNorm2d(channels)
    x, shortcut, grad = (
        torch.randn(batch, channels, side, side, dtype=setting.dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    inputs = x.requires_grad_(), shortcut.requires_grad_()

    def call() -> object:
        return torch.autograd.grad(batch_norm_relu(norm, x, shortcut), (*inputs, *norm.parameters()), grad)

    return call, 8 * x.nbytes  # x, shortcut, out; the gradient, x, out, and two gradients


def step(model: nn.Module, training: bool, images: Tensor, setting: Setting) -> Callable[[], object]:
    labels = torch.arange(len(images)) % len(CLASSES)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)

    def call() -> None:
        model.train(training)
        with torch.set_grad_enabled(training):
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bfloat16"):
                answer = model(images)
            if training:
                logits = answer if isinstance(answer, Tensor) else answer[CLASS]
                F.cross_entropy(logits.float(), labels).backward()
                optimiser.step()
                optimiser.zero_grad()

    return call


def seconds(call: Callable[[], object], setting: Setting) -> tuple[float, float]:
    """Of ours and of PyTorch's."""

    def pytorch() -> None:
        with switched_off():
            call()

    found = interleaved({"ours": call, "pytorch": pytorch}, setting.repeats, setting.synchronise)
    return found["ours"], found["pytorch"]


def run(setting: Setting) -> Table:
    """Makes the table."""
    keep_freed_memory()
    batch, rows = setting.batch_size or BATCH_SIZE, list[Row]()
    bandwidth, peak = copy_bandwidth(setting), peak_operations(setting)
    for channels, side in SHAPES:
        call, moved = passes(channels, side, batch, setting)
        ours, pytorch = (1e3 * second for second in seconds(call, setting))
        rows.append(Row(f"{channels} channels, {side}x{side}", "ms", ours, pytorch, 1e3 * moved / bandwidth))
    images = torch.randn(batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    config = load_config("small-images")
    student = build_network(config.student, CLASSES, SIZE, seed=0, tokens=tuple(config.teachers))
    if setting.precision == "bfloat16":
        plain_attention(student)
    networks = {
        f"{name} teacher": build_network(teacher, CLASSES, SIZE, 0) for name, teacher in config.teachers.items()
    }
    for name, network in {**networks, "student": student}.items():
        model = network.model
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for training, what in ((False, "answer"), (True, "training step")):
            floor = peak / operations(model, SIZE, backward=training)
            ours, pytorch = (batch / second for second in seconds(step(model, training, images, setting), setting))
            rows.append(Row(f"{name}, {what}", "images/s", ours, pytorch, floor))
    return Table("Batch norm, shortcut and ReLU", "PyTorch", rows, {**machine(setting), "batch": batch})
