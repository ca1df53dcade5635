"""Involution, a convolution turned inside out: a kernel for every position, shared by a group's channels.

Li et al., *Involution: Inverting the Inherence of Convolution for Visual Recognition*, CVPR 2021.

The operator is registered with PyTorch as ``coadvise::involution2d`` and ``coadvise::involution2d_backward``, so eager
code, ``torch.compile`` and ``torch.export`` see one node whatever computes it: ``cpu.py`` on CPU tensors, ``triton.py``
on CUDA tensors, plain PyTorch on every other device. An ONNX export contains plain operators instead, so that its
readers need nothing of this package.
"""

import itertools
import math
import subprocess
import warnings
from collections import OrderedDict
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from coadvise.errors import UserError
from coadvise.ops.agreement import agree
from coadvise.ops.batch_norm import FusedSequential
from coadvise.ops.cpu import involution2d_backward_cpu, involution2d_cpu
from coadvise.ops.reference import (
    empty_like_weight,
    involution2d_backward_reference,
    involution2d_reference,
    memory_format,
)

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def involution2d(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Filters each position of ``x`` with its own kernel: Eq. (4) of the paper, zero-padded to keep the size.

    Differentiable any number of times in reverse mode. `torch.func.jvp` sees a constant, as with every operator that
    `torch.library` registers. Under autocast it runs in the autocast dtype, as a convolution does; float64 stays.

    Args:
        x: [B, C, H, W], floating point. Channels-last memory is the fastest.
        weight: [B, G, K, K, h, w], with G dividing C, K odd, h = ceil(H / stride), w = ceil(W / stride), on the device
            of ``x``, of its dtype unless under autocast. Channel c of ``x`` uses kernel c // (C / G).
        stride: Step between output positions, at least 1.
        dilation: Step between the positions that a kernel sees, at least 1.

    Returns:
        [B, C, h, w], in the dtype (or autocast's) and the memory order of ``x``.

    Raises:
        UserError: Other shapes, dtypes or devices.
    """
    x, weight = _cast(x, weight)
    _check(x, weight, stride, dilation)
    return _plain(x, weight, stride) if dilation == 1 else _dilated(x, weight, stride, dilation)


def _plain(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    if torch.onnx.is_in_onnx_export():
        return involution2d_reference(x, weight, stride)
    out: Tensor = torch.ops.coadvise.involution2d.default(x, weight, stride)
    return out


def _dilated(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """Involutions without dilation of the images that every ``dilation``-th row and column make, so any kernel does.

    Of the outputs, every ``dilation / gcd(stride, dilation)``-th sees the same of these images.
    """
    apart = dilation // math.gcd(stride, dilation)
    out = torch.empty((*x.shape[:2], *weight.shape[4:]), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    for row, column in itertools.product(*(range(min(apart, size)) for size in out.shape[2:])):
        image, kernels, before = x, weight, [0, 0]
        for axis, first in enumerate((row, column)):
            image, kernels, before[axis] = _phase(image, kernels, axis, first, apart, stride, dilation)
        place = out[..., row::apart, column::apart]
        found = _plain(image, kernels, stride * apart // dilation)[..., before[0] :, before[1] :]
        place.copy_(found[..., : place.shape[2], : place.shape[3]])
    return out


def _phase(
    x: Tensor, weight: Tensor, axis: int, first: int, apart: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor, int]:
    """The image and the kernels of the outputs ``first``, ``first + apart``, ... along an axis (0 rows, 1 columns).

    The first of these outputs need not lie on the image's first position, so zeros are put before both.

    Returns:
        The image, its kernels, and how many of the outputs to leave out at the beginning.
    """
    step = stride * apart // dilation
    start, offset = first * stride % dilation, first * stride // dilation
    image = x[..., start::dilation, :] if axis == 0 else x[..., start::dilation]
    kernels = weight[..., first::apart, :] if axis == 0 else weight[..., first::apart]
    lead = -offset % step
    before = 1 if lead else 0
    length, outputs = image.shape[2 + axis] + lead, kernels.shape[4 + axis] + before
    more = max(0, (outputs - 1) * step + 1 - length)
    behind = -(-(length + more) // step) - outputs
    place = 2 * (1 - axis)  # F.pad counts from the last axis
    image = F.pad(image, [0] * place + [lead, more])
    return image, F.pad(kernels, [0] * place + [before, behind]), before


def _cast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on; float64 stays, as everywhere in PyTorch."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, weight
    if torch.float64 in (x.dtype, weight.dtype) or not (x.is_floating_point() and weight.is_floating_point()):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype)


def _check(x: Tensor, weight: Tensor, stride: int, dilation: int) -> None:
    if x.ndim != 4 or weight.ndim != 6:
        raise UserError(
            f"x has {x.ndim} dimensions and weight {weight.ndim}; they must be [B, C, H, W] and [B, G, K, K, h, w]; "
            f"a generator's [B, G*K*K, h, w] becomes that by weight.unflatten(1, (G, K, K))"
        )
    for name, value in (("stride", stride), ("dilation", dilation)):
        if not isinstance(value, (int, torch.SymInt)) or value < 1:
            raise UserError(f"{name} is {value!r}; it must be a whole number, at least 1")
    batch, channels, height, width = x.shape
    _, groups, kernel, _, _, _ = weight.shape
    if kernel % 2 == 0:
        raise UserError(f"the kernel in weight is {kernel} wide; it must be odd, so that it has a centre")
    if groups < 1 or channels < 1 or channels % groups:
        raise UserError(f"weight has {groups} groups for {channels} channels of x; the groups must divide the channels")
    expected = (batch, groups, kernel, kernel, -(-height // stride), -(-width // stride))
    if weight.shape != expected:
        raise UserError(
            f"weight is {list(weight.shape)}; for x {list(x.shape)} at stride {stride} it must be {list(expected)}: "
            f"one square kernel for each output position; pool the generator's input by the stride, rounding sizes up"
        )
    if x.device != weight.device:
        raise UserError(f"x is on {x.device} and weight on {weight.device}; move one to the other's device")
    if not {x.dtype, weight.dtype} <= DTYPES:
        raise UserError(
            f"x is {x.dtype} and weight {weight.dtype}; both must be floating point, of 16 to 64 bits; convert with "
            ".float()"
        )
    if x.dtype != weight.dtype:
        raise UserError(f"x is {x.dtype} and weight {weight.dtype}; convert one to the other's dtype, or use autocast")


class Involution2d(nn.Module):
    """An involution that generates its kernels from its own input.

    State-dict keys and the generator are those of the published RedNet, so its checkpoints load: ``conv1`` reduces the
    channels (1x1, BN, ReLU, on an average-pooled input when ``stride > 1``) and ``conv2`` (1x1 with bias) expands them
    to ``groups * kernel_size²``, laid out as [G, K, K]. Deviation: pooling rounds sizes up, so odd sizes work too.

    Args:
        channels: C of input and output.
        kernel_size: K, odd.
        stride: step between output positions.
        group_channels: channels that share one kernel; all of them when C is smaller, else it must divide C.
        reduction: how many times narrower than C the generator's hidden layer is.
        dilation: step between the positions that a kernel sees.

    Raises:
        UserError: for an even kernel, a non-positive size, or a group width that does not divide C.

    Shapes: [B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self, channels: int, kernel_size: int, stride: int = 1, group_channels: int = 16, reduction: int = 4,
        dilation: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"channels": channels, "stride": stride, "group_channels": group_channels, "reduction": reduction}
        for name, value in {**sizes, "dilation": dilation}.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"kernel_size is {kernel_size}; it must be odd and positive, for instance 3, 5 or 7")
        width = min(group_channels, channels)
        if channels % width:
            raise UserError(
                f"group_channels={group_channels} does not divide channels={channels}; choose a divisor of {channels}"
            )
        self.channels, self.kernel_size, self.stride, self.groups = channels, kernel_size, stride, channels // width
        self.dilation = dilation
        hidden = max(1, channels // reduction)
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.conv1 = FusedSequential(
            OrderedDict(conv=nn.Conv2d(channels, hidden, 1, bias=False), bn=nn.BatchNorm2d(hidden), act=nn.ReLU())
        )
        self.conv2 = nn.Sequential(OrderedDict(conv=nn.Conv2d(hidden, self.groups * kernel_size**2, 1)))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv2(self.conv1(self.pool(x)))  # [B, G*K*K, h, w]
        weight = weight.unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return involution2d(x, weight, self.stride, self.dilation)

    def extra_repr(self) -> str:
        about = f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, groups={self.groups}"
        return about if self.dilation == 1 else f"{about}, dilation={self.dilation}"


# ---- registration ----

_library = torch.library.Library("coadvise", "DEF")
_forward = "coadvise::involution2d"
_backward = "coadvise::involution2d_backward"
for _schema in (
    "involution2d(Tensor x, Tensor weight, int stride) -> Tensor",
    "involution2d_backward(Tensor grad, Tensor x, Tensor weight, int stride) -> (Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _forward_fake(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    shape = (x.shape[0], x.shape[1], weight.shape[4], weight.shape[5])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return grad_x, empty_like_weight(weight)


def _keep_forward(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, weight, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_forward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_weight = torch.ops.coadvise.involution2d_backward.default(grad, *ctx.saved_tensors, ctx.stride)
    return grad_x, grad_weight, None


def _keep_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    grad, x, weight, ctx.stride = inputs
    ctx.save_for_backward(grad, x, weight)


def _differentiate_backward(ctx: Any, of_x: Tensor, of_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """The operator is linear in ``x`` and in ``weight``, so these two operators make its second derivatives as well."""
    grad, x, weight = ctx.saved_tensors
    forward, backward = torch.ops.coadvise.involution2d.default, torch.ops.coadvise.involution2d_backward.default
    grad_grad = forward(of_x, weight, ctx.stride) + forward(x, of_weight, ctx.stride)
    grad_x, _ = backward(grad, x, of_weight, ctx.stride)
    _, grad_weight = backward(grad, of_x, weight, ctx.stride)
    return grad_grad, grad_x, grad_weight, None


def _forward_flops(x: torch.Size, weight: torch.Size, stride: int, *, out_shape: torch.Size, **_: Any) -> int:
    """A multiplication and an addition for each of an output's K² neighbours."""
    return 2 * math.prod(out_shape) * weight[2] * weight[3]


def _backward_flops(grad: torch.Size, x: torch.Size, weight: torch.Size, stride: int, **_: Any) -> int:
    """As much for each of the two gradients."""
    return 2 * _forward_flops(x, weight, stride, out_shape=grad)


@cache
def _triton() -> Any:
    """The module of CUDA kernels; None, after one warning, where Triton is missing or cannot compile."""
    try:
        kernels = import_module("coadvise.ops.triton")
        kernels.check_driver()
    except ImportError as error:
        remedy, fault = "Install triton", str(error)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        remedy, fault = "Triton needs a C compiler and Python's headers", str(error).partition("\n")[0]
    else:
        return kernels
    message = f"involution runs in plain PyTorch on CUDA, many times slower: {fault}. {remedy}."
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return None


def _kernels(x: Tensor) -> Any:
    """The CUDA kernels, if there are some that give what plain PyTorch gives."""
    kernels = _triton()
    return kernels if kernels is not None and agree(kernels, x) else None


def _forward_cuda(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    kernels = _kernels(x)
    return (involution2d_reference if kernels is None else kernels.involution2d_triton)(x, weight, stride)


def _backward_cuda(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    kernels = _kernels(x)
    backward = involution2d_backward_reference if kernels is None else kernels.involution2d_backward_triton
    return backward(grad, x, weight, stride)


_library.impl("involution2d", involution2d_cpu, "CPU")
_library.impl("involution2d_backward", involution2d_backward_cpu, "CPU")
_library.impl("involution2d", _forward_cuda, "CUDA")
_library.impl("involution2d_backward", _backward_cuda, "CUDA")
_library.impl("involution2d", involution2d_reference, "CompositeExplicitAutograd")
_library.impl("involution2d_backward", involution2d_backward_reference, "CompositeExplicitAutograd")
torch.library.register_fake(_forward, _forward_fake, lib=_library)
torch.library.register_fake(_backward, _backward_fake, lib=_library)
torch.library.register_autograd(_forward, _differentiate_forward, setup_context=_keep_forward, lib=_library)
torch.library.register_autograd(_backward, _differentiate_backward, setup_context=_keep_backward, lib=_library)
register_flop_formula(torch.ops.coadvise.involution2d)(_forward_flops)
register_flop_formula(torch.ops.coadvise.involution2d_backward)(_backward_flops)
