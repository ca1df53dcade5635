"""Exported students against timm's distilled DeiTs, exported in the same way, in ONNX Runtime on a CPU, at 224 pixels.

The networks and comparisons are those of benchmarks/student.py, in float32. Each is written by the export of `coadvise
export`, read by a session with the same options, and called in turns on the same batch; every figure is a median.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import onnxruntime
import torch
from torch import nn

from benchmarks.student import COMPARISONS, SIZE, networks
from benchmarks.table import Row, Setting, Table, machine
from coadvise.deploy.onnx_file import in_onnx_runtime, to_bytes, to_onnx
from coadvise.errors import UserError
from coadvise.evaluation.speed import interleaved

BATCH_SIZE = 8


def session(model: nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    """A call of the exported network."""
    return partial(in_onnx_runtime(to_bytes(to_onnx(model, images[:2]))), images.numpy())


def run(setting: Setting) -> Table:
    """Times the five exported networks."""
    if setting.device.type != "cpu" or setting.precision != "float32" or setting.compile:
        raise UserError("the benchmark 'export' runs in float32 on a CPU, not compiled; give --device cpu alone")
    batch = setting.batch_size or BATCH_SIZE
    models = networks()
    images = torch.rand(batch, 3, SIZE, SIZE)
    calls = {name: session(model, images) for name, model in models.items()}
    seconds = interleaved(calls, setting.repeats, setting.synchronise)
    speed = {name: batch / time for name, time in seconds.items()}
    rows = [Row(row, "images/s", speed[name], speed[peer], goal=goal) for row, name, peer, _, goal in COMPARISONS]
    about = {**machine(setting), "onnxruntime": onnxruntime.__version__, "batch": batch, "pixels": SIZE}
    return Table("an exported student against timm's distilled DeiT, ONNX Runtime", "timm DeiT", rows, about)
