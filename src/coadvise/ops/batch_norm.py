"""Batch norm with the shortcut and the ReLU behind it, as one operation on CPU tensors.

PyTorch's three operations read and write each activation five times in a training step; ``batch_norm_cpu.c`` makes two
passes forward and two backward (docs/PERFORMANCE.md). A compiler fuses by itself, and an export needs plain operators:
both see PyTorch's.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coadvise.ops import native

SOURCE = Path(__file__).with_name("batch_norm_cpu.c")
LANES = 16  # the most that the kernel takes
DTYPES = (torch.float32, torch.bfloat16)


def batch_norm_relu(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
    """``relu(norm(x) + shortcut)``, all [B, C, H, W]; running averages are kept as `nn.BatchNorm2d` keeps them.

    May overwrite what ``norm`` returns, as in-place operations do.

    Args:
        norm: a batch norm, or whatever has taken its place.
        shortcut: None for none.
        relu: False for no ReLU.
    """
    if type(norm) is not nn.BatchNorm2d or not _applies(norm, x, shortcut):
        out = norm(x)
        if shortcut is not None:
            out += shortcut  # in place: no layer's gradient needs what it was
        return F.relu(out, inplace=True) if relu else out
    arguments = x, norm.weight, norm.bias, shortcut, norm.running_mean, norm.running_var
    out, mean, var = torch.ops.coadvise.batch_norm_relu.default(*arguments, norm.training, norm.eps, relu)
    if norm.training:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
            norm.num_batches_tracked += 1
    return out


class FusedSequential(nn.Sequential):
    """A sequence in which each batch norm and the ReLU behind it, if there is one, are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        modules = list(self)
        done = False
        for module, behind in zip_longest(modules, modules[1:]):
            if done:  # with the norm before it
                done = False
            elif isinstance(module, nn.BatchNorm2d):
                done = isinstance(behind, nn.ReLU) and not _hooked(behind)
                x = batch_norm_relu(module, x, relu=done)
            else:
                x = module(x)
        return x


_off = False


@contextmanager
def switched_off(off: bool = True) -> Iterator[None]:
    """Within it PyTorch does everything on a CPU too, as it does on a GPU."""
    global _off
    before, _off = _off, off
    try:
        yield
    finally:
        _off = before


def _applies(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> bool:
    """Whether the operator does what the layer would do, and a kernel for it is there."""
    if _off or x.device.type != "cpu" or x.dtype not in DTYPES or x.ndim != 4 or not x.numel():
        return False
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or _hooked(norm):
        return False
    if norm.weight is None or norm.weight.dtype != torch.float32 or norm.momentum is None or norm.running_mean is None:
        return False
    if not norm.training and torch.is_grad_enabled():
        return False  # averages that are given have other gradients
    values = x.shape[0] * x.shape[2] * x.shape[3]
    if values < 2 or values % (LANES // math.gcd(x.shape[1], LANES)):
        return False
    fits = x.is_contiguous(memory_format=torch.channels_last)
    if shortcut is not None:
        same = shortcut.shape == x.shape and shortcut.dtype == x.dtype
        fits = fits and same and shortcut.is_contiguous(memory_format=torch.channels_last)
    return fits and _kernels() is not None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@cache
def _kernels() -> tuple[Callable[..., int], Callable[..., int]] | None:
    """The compiled functions; None, after one warning, where they could not be built."""
    library = native.load(SOURCE, "batch norm runs in plain PyTorch, two to three times slower")
    pointer, number, sizes = ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p
    forward = native.function(library, "batch_norm", sizes, number, ctypes.c_int, *[pointer] * 7)
    backward = native.function(library, "batch_norm_backward", sizes, number, *[pointer] * 10)
    return None if forward is None or backward is None else (forward, backward)


# ---- registration ----


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, running_mean: Tensor, running_var: Tensor,
    training: bool, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and the mean and variance [C] that it was made with, copies if they are the running ones."""
    out, mean, var = _forward_fake(x, weight, bias, shortcut, running_mean, running_var, training, eps, relu)
    if not training:
        mean.copy_(running_mean)
        var.copy_(running_var)
    _call(0, x, relu, eps, int(training), x, weight, bias, shortcut, out, mean, var)
    return out, mean, var


def _forward_fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _backward(
    grad: Tensor, x: Tensor, out: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, relu: bool,
    with_shortcut: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and the shortcut; without a shortcut the last is empty."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    found = _backward_fake(grad, x, out, weight, mean, var, eps, relu, with_shortcut)
    of_x, of_weight, of_bias, of_shortcut = found
    last = of_shortcut if with_shortcut else None
    _call(1, x, relu, eps, grad, x, out, weight, mean, var, of_x, last, of_weight, of_bias)
    return found


def _backward_fake(
    grad: Tensor, x: Tensor, out: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, relu: bool,
    with_shortcut: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_shortcut = torch.empty_like(x) if with_shortcut else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), of_shortcut


def _call(which: int, x: Tensor, relu: bool, eps: float, *arguments: Tensor | int | None) -> None:
    kernels = _kernels()
    assert kernels is not None  # `_applies` asked
    sizes = x.numel() // x.shape[1], x.shape[1], int(x.dtype == torch.bfloat16), int(relu), torch.get_num_threads()
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if kernels[which]((ctypes.c_int64 * len(sizes))(*sizes), eps, *pointers):
        raise MemoryError(f"no memory for the batch norm of a tensor {list(x.shape)}; use a smaller batch or image")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, shortcut, _, _, _, ctx.eps, ctx.relu = inputs
    ctx.with_shortcut = shortcut is not None
    ctx.save_for_backward(x, weight, bias, shortcut, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, shortcut, out, mean, var = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    if torch.is_grad_enabled():  # gradients of gradients: PyTorch's own
        plain = F.batch_norm(x, None, None, weight, bias, training=True, eps=ctx.eps)
        plain = plain if shortcut is None else plain + shortcut
        inputs = (x, weight, bias) if shortcut is None else (x, weight, bias, shortcut)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        of = iter(torch.autograd.grad(F.relu(plain) if ctx.relu else plain, wanted, grad, create_graph=True))
        found = [next(of) if tensor.requires_grad else None for tensor in inputs]
        return (*found, *[None] * (9 - len(found)))
    of_x, of_weight, of_bias, of_shortcut = torch.ops.coadvise.batch_norm_relu_backward.default(
        grad, x, out, weight, mean, var, ctx.eps, ctx.relu, ctx.with_shortcut
    )
    return of_x, of_weight, of_bias, of_shortcut if ctx.with_shortcut else None, *[None] * 5


_library = torch.library.Library("coadvise", "FRAGMENT")
_name = "coadvise::batch_norm_relu"
_library.define(
    "batch_norm_relu(Tensor x, Tensor weight, Tensor bias, Tensor? shortcut, Tensor running_mean, Tensor running_var, "
    "bool training, float eps, bool relu) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "batch_norm_relu_backward(Tensor grad, Tensor x, Tensor out, Tensor weight, Tensor mean, Tensor var, float eps, "
    "bool relu, bool with_shortcut) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("batch_norm_relu", _forward, "CPU")
_library.impl("batch_norm_relu_backward", _backward, "CPU")
torch.library.register_fake(_name, _forward_fake, lib=_library)
torch.library.register_fake(f"{_name}_backward", _backward_fake, lib=_library)
torch.library.register_autograd(_name, _differentiate, setup_context=_keep, lib=_library)
