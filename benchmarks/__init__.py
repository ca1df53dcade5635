"""Benchmarks, each against a named peer in the same process: `python -m benchmarks NAME`."""

from importlib import import_module
from typing import Literal, cast

import torch

from benchmarks.table import Setting, Table
from coadvise.config import nearest
from coadvise.errors import UserError

# Each is a module here with a function `run(setting: Setting) -> Table`.
NAMES = ("involution", "step", "student", "loader", "cache", "growth", "checkpoint")


def run_benchmark(
    name: str, precision: str, batch_size: int = 0, repeats: int = 9, compiled: bool = False, device: str = "auto"
) -> Table:
    """Runs a benchmark by name. Raises UserError for a name, precision or device there is none of."""
    for what, given, allowed in (
        ("benchmark", name, NAMES),
        ("precision", precision, ("float32", "bfloat16")),
        ("device", device, ("auto", "cpu", "cuda")),
    ):
        if given not in allowed:
            raise UserError(f"unknown {what} '{given}'{nearest(given, allowed)}; allowed: {', '.join(allowed)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no CUDA device; use cpu or auto")
    where = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    kind = cast(Literal["float32", "bfloat16"], precision)
    setting = Setting(torch.device(where), kind, batch_size, repeats, compiled)
    return import_module(f"benchmarks.{name}").run(setting)
