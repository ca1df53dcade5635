"""Involution on CPU tensors: calls ``involution_cpu.c`` on channels-last memory, or plain PyTorch without it."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from coadvise.ops import native
from coadvise.ops.reference import (
    involution2d_backward_reference,
    involution2d_reference,
    like_weight,
    memory_format,
    pixel_major,
)

SOURCE = Path(__file__).with_name("involution_cpu.c")
DTYPES = (torch.float32, torch.bfloat16)


def involution2d_cpu(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Involution on CPU tensors: [B, C, H, W] and [B, G, K, K, h, w] to [B, C, h, w] in the memory order of ``x``."""
    kernel = native_kernel() if x.dtype == weight.dtype and x.dtype in DTYPES else None
    if kernel is None:
        return involution2d_reference(x, weight, stride)
    height, width = weight.shape[-2:]
    out = torch.empty((x.shape[0], x.shape[1], height, width), dtype=x.dtype, memory_format=torch.channels_last)
    image, pixels = x.contiguous(memory_format=torch.channels_last), pixel_major(weight).contiguous()
    _call(kernel, _sizes(x, weight, stride), image, pixels, out, None, None, None)
    return out.contiguous(memory_format=memory_format(x))


def involution2d_backward_cpu(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``, each in the shape, dtype and memory order of its tensor."""
    kernel = native_kernel() if grad.dtype == x.dtype == weight.dtype and x.dtype in DTYPES else None
    if kernel is None:
        return involution2d_backward_reference(grad, x, weight, stride)
    grad, image = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    pixels = pixel_major(weight).contiguous()
    grad_x, grad_pixels = torch.empty_like(image, memory_format=torch.channels_last), torch.empty_like(pixels)
    _call(kernel, _sizes(x, weight, stride), image, pixels, None, grad, grad_x, grad_pixels)
    return grad_x.contiguous(memory_format=memory_format(x)), like_weight(grad_pixels, weight)


def _sizes(x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
    batch, channels, height, width = x.shape
    _, groups, kernel, _, out_height, out_width = weight.shape
    bf16 = int(x.dtype == torch.bfloat16)
    sizes = (batch, height, width, groups, channels // groups, kernel, stride, out_height, out_width)
    return *sizes, bf16, torch.get_num_threads()


def _call(kernel: Callable[..., int], sizes: tuple[int, ...], *tensors: Tensor | None) -> None:
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    if kernel((ctypes.c_int64 * len(sizes))(*sizes), *pointers):
        raise MemoryError(
            f"no memory for the involution kernel's buffers at sizes {sizes}; use a smaller batch or image"
        )


@cache
def native_kernel() -> Callable[..., int] | None:
    """The compiled function; None, after one warning, where it could not be built."""
    library = native.load(SOURCE, "involution runs in plain PyTorch, many times slower")
    return native.function(library, "involution", *[ctypes.c_void_p] * 7)
