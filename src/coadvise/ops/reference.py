"""Involution in plain PyTorch: the reference for every kernel, and the fallback where there is none."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def involution2d_reference(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Involution (Li et al., CVPR 2021, Eq. 4) by shift and accumulate.

    ``out[b, c, i, j] = sum_uv weight[b, g(c), u, v, i, j] * x[b, c, i*stride + u - p, j*stride + v - p]`` with
    ``p = (K - 1) // 2``, zeros outside the image, and ``g(c) = c // (C // G)``.

    One shift at a time needs K² passes over the output, but no K²-fold copy of the input as ``F.unfold`` makes.
    Half precision is summed in float32 and rounded once; differentiable any number of times.

    Args:
        x: [B, C, H, W], floating point.
        weight: [B, G, K, K, h, w], the dtype of ``x``; G divides C, K is odd, h = ceil(H / stride), w likewise.
        stride: step between output positions, at least 1.

    Returns:
        [B, C, h, w] in the dtype and the memory order of ``x``.
    """
    batch, channels, _, _ = x.shape
    _, groups, kernel, _, height, width = weight.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded = _padded(x, groups, kernel)
    out = torch.zeros((batch, groups, channels // groups, height, width), dtype=dtype, device=x.device)
    for u, v, rows, columns in _shifts(weight, stride):
        out = out + weight[:, :, u, v].unsqueeze(2).to(dtype) * padded[..., rows, columns]
    return out.flatten(1, 2).to(x.dtype).contiguous(memory_format=memory_format(x))


def involution2d_backward_reference(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight`` from ``grad``, that of the output; each in its tensor's dtype and memory order.

    Written out, since autograd does not run inside an operator's own backward.
    """
    _, groups, kernel, _, _, _ = weight.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    pad = (kernel - 1) // 2
    grouped = grad.unflatten(1, (groups, -1)).to(dtype)  # [B, G, C/G, h, w]
    padded = _padded(x, groups, kernel)
    grad_padded = torch.zeros_like(padded, dtype=dtype)
    grad_weight = torch.empty_like(pixel_major(weight), memory_format=torch.contiguous_format)  # [B, h, w, G, K, K]
    for u, v, rows, columns in _shifts(weight, stride):
        grad_padded[..., rows, columns] += weight[:, :, u, v].unsqueeze(2).to(dtype) * grouped
        grad_weight[..., u, v] = (grouped * padded[..., rows, columns]).sum(2).permute(0, 2, 3, 1)
    grad_x = F.pad(grad_padded, (-pad, -pad, -pad, -pad)).flatten(1, 2).to(x.dtype)
    return grad_x.contiguous(memory_format=memory_format(x)), like_weight(grad_weight, weight)


def _padded(x: Tensor, groups: int, kernel: int) -> Tensor:
    pad = (kernel - 1) // 2
    return F.pad(x, (pad, pad, pad, pad)).unflatten(1, (groups, -1))  # [B, G, C/G, H + 2p, W + 2p]


def _shifts(weight: Tensor, stride: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Each tap (u, v) with the rows and columns of the padded input that it reads for all outputs."""
    kernel, height, width = weight.shape[3:]
    for u, v in itertools.product(range(kernel), range(kernel)):
        rows = slice(u, u + (height - 1) * stride + 1, stride)
        yield u, v, rows, slice(v, v + (width - 1) * stride + 1, stride)


# ---- memory order: what every implementation and the shape inference agree on ----


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of results for ``x``: channels-last only when ``x`` is that and nothing else."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def pixel_major(weight: Tensor) -> Tensor:
    """[B, G, K, K, h, w] seen as [B, h, w, G, K, K], as a channels-last 1x1 convolution leaves it in memory."""
    return weight.permute(0, 4, 5, 1, 2, 3)


def like_weight(pixels: Tensor, weight: Tensor) -> Tensor:
    """[B, h, w, G, K, K] back to the shape and the memory order of ``weight``."""
    result = pixels.permute(0, 3, 4, 5, 1, 2)
    return result if pixel_major(weight).is_contiguous() else result.contiguous()


def empty_like_weight(weight: Tensor) -> Tensor:
    """Memory for a gradient of ``weight``, in the memory order that `like_weight` gives."""
    if pixel_major(weight).is_contiguous():
        return like_weight(weight.new_empty(pixel_major(weight).shape), weight)
    return weight.new_empty(weight.shape)
