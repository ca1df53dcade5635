"""3x3 convolution with a bias and ReLU, for inference: a Winograd kernel on CPUs, plain torch elsewhere.

Of the multiplications of an aligned student's stems at 224 pixels such convolutions are 1.2 billion in 1.9. Registered
with PyTorch as ``coadvise::conv3x3_relu``. It has no gradient.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from coadvise.errors import UserError
from coadvise.ops import native, onednn
from coadvise.ops.register import register

SOURCE = Path(__file__).with_name("convolution_cpu.c")
POINTS = (0.75, 1.5)  # and their negatives, 0 and infinity; the kernel's


def conv3x3_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve with stride 1 and one pixel of zeros around, add the bias, and clamp at 0.

    On a CPU, where `takes` says so, by Winograd's F(4x4, 3x3): a quarter of the multiplications, and in float32 about
    twice the rounding error of a plain sum. There an infinity or NaN makes NaN of whole tiles of 4x4 outputs around it.
    bfloat16 is widened on its way in, and rounded once, on its way out.

    Args:
        x: [B, I, H, W], floating point, channels-last for speed.
        weight: [O, I, 3, 3], dtype and device of ``x``.
        bias: [O], likewise.

    Returns:
        [B, O, H, W] in the dtype of ``x``, channels-last.

    Raises:
        UserError: for shapes, dtypes or devices other than these.
    """
    outputs = weight.shape[0] if weight.ndim else 0
    expected = (outputs, x.shape[1] if x.ndim == 4 else 0, 3, 3)
    if x.ndim != 4 or weight.shape != expected or bias.shape != (outputs,):
        raise UserError(
            f"x is {list(x.shape)}, weight {list(weight.shape)} and bias {list(bias.shape)}; "
            "they must be [B, I, H, W], [O, I, 3, 3] and [O]"
        )
    if len({(t.dtype, t.device) for t in (x, weight, bias)}) > 1:
        found = ", ".join(f"{t.dtype} on {t.device}" for t in (x, weight, bias))
        raise UserError(f"x, weight and bias are {found}; convert them to one dtype and device")
    out: Tensor = torch.ops.coadvise.conv3x3_relu.default(x, weight, bias)
    return out


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the native kernel computes these: on a CPU, channels in whole vectors, of one dtype that autocast keeps.

    bfloat16 it computes in float32, but not where oneDNN has AMX. Without, that took four times as long on a Xeon.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == onednn.precision(x)
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not onednn.has_amx))
        and (multiples := _multiples()) is not None
        and weight.shape[1] % multiples[0] == weight.shape[0] % multiples[1] == 0
    )


def transformed(weight: Tensor) -> Tensor:
    """G w Gᵀ of each pair of channels: [O, I, 3, 3] to float32 [36, I, O], computed in float64."""
    a, b = POINTS
    at_a, at_b = 1 / (2 * a**2 * (a**2 - b**2)), 1 / (2 * b**2 * (b**2 - a**2))
    rows = [[1 / (a * b) ** 2, 0, 0]]
    for point, factor in ((a, at_a), (-a, at_a), (b, at_b), (-b, at_b)):
        rows.append([factor, factor * point, factor * point**2])
    matrix = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    flat = torch.kron(matrix, matrix) @ weight.permute(2, 3, 1, 0).flatten(2).flatten(0, 1).double()
    return flat.float().unflatten(1, (weight.shape[1], weight.shape[0]))


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = F.conv2d(x, weight, bias, padding=1).relu_()
    return out.to(x.dtype, memory_format=torch.channels_last)  # autocast may have made another of it


def _cpu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not takes(x, weight):
        return _plain(x, weight, bias)
    kernel = _kernel()
    assert kernel is not None
    batch, inputs, height, width = x.shape
    out = _empty(x, weight, bias)
    sizes = (batch, height, width, inputs, weight.shape[0], int(x.dtype == torch.bfloat16), torch.get_num_threads())
    tensors = (
        x.contiguous(memory_format=torch.channels_last),
        transformed(weight).contiguous(),
        bias.float().contiguous(),
        out,
    )
    if kernel((ctypes.c_int64 * len(sizes))(*sizes), *(t.data_ptr() for t in tensors)):
        raise MemoryError(f"no memory for the convolution's buffers at sizes {sizes}; use a smaller image")
    return out


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled source; None, after one warning, where it cannot be had."""
    return native.load(SOURCE, "convolutions of an aligned student's stems run in plain torch, at half the speed")


def _kernel() -> Callable[..., int] | None:
    return native.function(_library(), "convolution", *[ctypes.c_void_p] * 5)


@torch.compiler.assume_constant_result  # a graph need not know how it is found
def _multiples() -> tuple[int, int] | None:
    """What numbers of input and of output channels must be multiples of; None without the library."""
    library = _library()
    return None if library is None else (library.inputs_multiple(), library.outputs_multiple())


def _empty(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


register("conv3x3_relu(Tensor x, Tensor weight, Tensor bias) -> Tensor", cpu=_cpu, plain=_plain, empty=_empty)
