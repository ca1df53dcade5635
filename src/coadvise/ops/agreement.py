"""Whether a device's kernels of involution agree with plain PyTorch, asked before they are first used."""

import hashlib
import json
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coadvise.errors import StorageError
from coadvise.machine import cache_folder
from coadvise.ops.reference import involution2d_backward_reference, involution2d_reference, memory_format
from coadvise.storage import write_text

FILE = "kernels.json"  # in the user's cache folder: what agreed
# Largest relative error of the results, by their dtype; sums are in float32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def agree(kernels: Any, x: Tensor) -> bool:
    """Whether these kernels are right for tensors like ``x``: its device, dtype and memory order.

    They compute a small involution and its gradients the first time, which takes milliseconds once they are compiled.
    What agreed is kept on disk, by device and versions. Kernels that do not agree are never used, and a warning says so
    once a process.
    """
    return x.dtype not in TOLERANCE or _agree(kernels, str(x.device), x.dtype, memory_format(x))


@cache
def _agree(kernels: Any, device: str, dtype: torch.dtype, order: torch.memory_format) -> bool:
    key, path = _key(kernels, device, dtype, order), None
    if (folder := cache_folder()) is not None:
        path = folder / FILE
        if key in _known(path):
            return True
    fault = _fault(kernels, device, dtype, order)
    if fault is None:
        _remember(path, key)
        return True
    message = f"involution runs in plain PyTorch on {device} in {dtype}, many times slower: its kernels {fault}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return False


def _fault(kernels: Any, device: str, dtype: torch.dtype, order: torch.memory_format) -> str | None:
    """What is wrong with the kernels; None if nothing is."""
    draws = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws).to(device, dtype)

    x, grad = (made(2, 32, *size).contiguous(memory_format=order) for size in ((5, 6), (3, 3)))
    weight = made(2, 3, 3, 2, 3, 3).permute(0, 3, 4, 5, 1, 2)  # a channels-last generator's order
    exact = (grad.double(), x.double(), weight.double())
    expected = involution2d_reference(*exact[1:], 2), *involution2d_backward_reference(*exact, 2)
    try:
        found = kernels.involution2d_triton(x, weight, 2), *kernels.involution2d_backward_triton(grad, x, weight, 2)
    except Exception as error:  # the compiler and the driver raise many kinds
        return f"failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    errors = [((one.double() - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True)]
    wrong = [error for error in errors if not error <= TOLERANCE[dtype]]  # also what is not a number
    return f"are wrong (relative error {wrong[0]:.2g})" if wrong else None


def _key(kernels: Any, device: str, dtype: torch.dtype, order: torch.memory_format) -> str:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    source = Path(kernels.__file__).read_bytes()
    return " ".join([name, torch.__version__, hashlib.sha256(source).hexdigest()[:12], str(dtype), str(order)])


def _known(path: Path) -> list[str]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return known if isinstance(known, list) else []


def _remember(path: Path | None, key: str) -> None:
    """Where nothing can be kept, or another process wrote at the same time, a later process asks anew."""
    if path is not None:
        with suppress(StorageError):
            write_text(path, json.dumps(sorted({*_known(path), key}), indent=1) + "\n")
