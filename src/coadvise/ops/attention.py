"""Attention of all heads, for inference: a kernel on CPUs, plain torch elsewhere.

Registered with PyTorch as ``coadvise::attention``. It has no gradient.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from coadvise.errors import UserError
from coadvise.ops import native
from coadvise.ops.register import register

SOURCE = Path(__file__).with_name("attention_cpu.c")


def attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v of every head.

    Args:
        qkv: [B, N, 3 x heads x d], floating point: queries, keys and values of all heads, as a transformer block's one
            linear layer makes them.
        heads: How many there are.

    Returns:
        [B, N, heads x d] in the dtype of ``qkv``, contiguous.

    Raises:
        UserError: for another shape or dtype.
    """
    if qkv.ndim != 3 or heads < 1 or qkv.shape[2] % (3 * heads) or not qkv.shape[2]:
        raise UserError(f"qkv is {list(qkv.shape)}; for {heads} heads it must be [B, N, 3 x heads x width of a head]")
    if not qkv.dtype.is_floating_point:
        raise UserError(f"qkv is {qkv.dtype}; it must be floating point; convert it with .float()")
    out: Tensor = torch.ops.coadvise.attention.default(qkv, heads)
    return out


def takes(qkv: Tensor, heads: int) -> bool:
    """Whether the native kernel computes it: float32 on a CPU, a few tokens or more, heads of whole vectors."""
    return (
        qkv.device.type == "cpu"
        and qkv.dtype == torch.float32
        and (needs := _needs()) is not None
        and qkv.shape[1] >= needs[0]
        and qkv.shape[2] // (3 * heads) % needs[1] == 0
    )


def plain(qkv: Tensor, heads: int) -> Tensor:
    """The same in PyTorch's operators, with a gradient."""
    query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return out.to(qkv.dtype).contiguous()  # autocast may have made another of it


def _cpu(qkv: Tensor, heads: int) -> Tensor:
    if not takes(qkv, heads):
        return plain(qkv, heads)
    kernel = _kernel()
    assert kernel is not None
    qkv, out = qkv.contiguous(), _empty(qkv, heads)
    batch, tokens, width = out.shape
    sizes = (batch, tokens, heads, width // heads, torch.get_num_threads())
    if kernel((ctypes.c_int64 * len(sizes))(*sizes), qkv.data_ptr(), out.data_ptr()):
        raise MemoryError(f"no memory for the buffers of attention at sizes {sizes}; use a smaller image")
    return out


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled source; None, after one warning, where it cannot be had."""
    return native.load(SOURCE, "a student's attention runs in plain torch, at two thirds of the speed")


def _kernel() -> Callable[..., int] | None:
    return native.function(_library(), "attention", *[ctypes.c_void_p] * 3)


@torch.compiler.assume_constant_result  # a graph need not know how it is found
def _needs() -> tuple[int, int] | None:
    """The fewest tokens, and what a head's width must be a multiple of; None without the library."""
    library = _library()
    return None if library is None else (library.tokens_at_least(), library.width_multiple())


def _empty(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


register("attention(Tensor qkv, int heads) -> Tensor", cpu=_cpu, plain=plain, empty=_empty)
