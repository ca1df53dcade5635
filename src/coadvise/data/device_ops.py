"""What DeiT's views do to a picture, as tensor operations on a batch, on any device.

Pictures are bytes before and after each operation, rounded as Pillow and PyTorch's resizing do. Sums are of integers
that float32 holds exactly, so neither the rest of the batch nor the order of summing changes them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from coadvise.data.images import PADDING
from coadvise.data.pipeline import Operation

LARGEST = 2  # times that `resized` reduces a side; its filter then reaches over 9 pixels
_MOVED_AT_ONCE = 16  # pictures; of 224 pixels they take 0.6 GB
_TAPS = 4 * LARGEST + 1
_LUMA = (19595, 38470, 7471)  # of 65536: Pillow's grey


def sent(values: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Values copied from the host to where views are made; to a CUDA device asynchronously, from pinned memory."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# resizing -------------------------------------------------------------------------------------------------------------


def resized(regions: Tensor, sides: Tensor, boxes: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions resized by antialiased bicubic interpolation, as `F.interpolate` does with bytes, and padded.

    Args:
        regions: [B, H, W, 3] uint8, each in the top left corner of its place.
        sides: [B, 2] int64, height and width of each region, at most `LARGEST` times those of its box.
        boxes: [B, 4] int64, what each region becomes part of the result: top, left, height, width. Beside it is
            `PADDING`.
        mirrored: [B] bool, left and right.
        size: height and width of the result.

    Returns:
        [B, 3, *size] uint8.
    """
    batch, tall, wide, _ = regions.shape
    rows, rows_inside = _weights(sides[:, 0], boxes[:, 0], boxes[:, 2], torch.zeros_like(mirrored), size[0], tall)
    columns, columns_inside = _weights(sides[:, 1], boxes[:, 1], boxes[:, 3], mirrored, size[1], wide)
    across = _rounded(columns, regions.permute(0, 2, 1, 3).reshape(batch, wide, -1).float())  # [B, W', H * 3]
    across = across.view(batch, size[1], tall, 3).transpose(1, 2).reshape(batch, tall, -1)
    whole = _rounded(rows, across).view(batch, *size, 3)
    inside = (rows_inside[:, :, None] & columns_inside[:, None, :])[..., None]
    ground = torch.tensor(PADDING, dtype=torch.float32).to(regions.device)
    return torch.where(inside, whole, ground).permute(0, 3, 1, 2).to(torch.uint8).contiguous()


def _weights(
    side: Tensor, offset: Tensor, inner: Tensor, mirrored: Tensor, size: int, width: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """One axis of `resized`: integer weights [B, size, width] with their scale [B, 1, 1], and what lies in the box."""
    place = torch.arange(size, device=side.device)
    place = torch.where(mirrored[:, None], size - 1 - place, place) - offset[:, None]
    inside = (place >= 0) & (place < inner[:, None])
    scale = (side.double() / inner)[:, None]
    reach = scale.clamp(min=1)
    centre = scale * (place + 0.5)
    first = (centre - 2 * reach + 0.5).floor().clamp(min=0)
    taps = first[..., None] + torch.arange(_TAPS, device=side.device)
    last = torch.minimum((centre + 2 * reach + 0.5).floor(), side[:, None])
    weight = _cubic((taps - centre[..., None] + 0.5) / reach[..., None]) * (taps < last[..., None])
    weight = weight * inside[..., None]
    weight = weight / weight.sum(-1, keepdim=True).where(inside[..., None], 1.0)
    # Bits as PyTorch has them; 15 at most, so that sums stay below 2^24.
    bits = torch.where(weight.amax((1, 2)) * 2**15 + 0.5 < 2**15, 2.0**15, 2.0**14)[:, None, None]
    weight = (weight.abs() * bits + 0.5).floor() * weight.sign()
    dense = torch.zeros(len(side), size, width + _TAPS, device=side.device)
    at = taps.clamp(0, width + _TAPS - 1).long().where(inside[..., None], torch.arange(_TAPS, device=side.device))
    return (dense.scatter_(2, at, weight.float())[..., :width], bits.float()), inside


def _cubic(x: Tensor) -> Tensor:
    """Keys's kernel with a = -1/2, as PyTorch and Pillow resize with antialiasing."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _rounded(weights: tuple[Tensor, Tensor], values: Tensor) -> Tensor:
    """[B, size, width] @ [B, width, N], rounded to bytes."""
    matrix, scale = weights
    return (torch.bmm(matrix, values) / scale + 0.5).floor_().clamp_(0, 255)


# RandAugment ----------------------------------------------------------------------------------------------------------

Change = Callable[[Tensor, Tensor], Tensor]  # [B, 3, H, W] uint8 and arguments [B, n] float64 to [B, 3, H, W] uint8


def augment_(images: Tensor, drawn: Sequence[Sequence[Operation]]) -> None:
    """Applies timm's operations to a batch [B, 3, H, W] uint8, in place: to each picture its own, in order."""
    height, width = images.shape[-2:]
    for layer in range(max(map(len, drawn), default=0)):
        found: dict[Change, list[tuple[int, tuple[float, ...]]]] = {}
        for row, operations in enumerate(drawn):
            if layer < len(operations):
                name, argument = operations[layer]
                if name in _MATRICES:
                    found.setdefault(_moved, []).append((row, _MATRICES[name](argument, height, width)))
                else:
                    found.setdefault(_CHANGES[name], []).append((row, (argument,)))
        for change, which in found.items():
            rows, arguments = zip(*which, strict=True)
            there = sent(np.array(rows), images.device)
            images[there] = change(images[there], sent(np.array(arguments), images.device))


def unknown(names: Iterable[str]) -> list[str]:
    """Those of timm's operations that `augment_` does not know."""
    return sorted({*names} - _CHANGES.keys() - _MATRICES.keys())


def _moved(images: Tensor, matrices: Tensor) -> Tensor:
    """Pillow's `Image.transform` by matrices [B, 6], with its bicubic kernel (a = -1); `PADDING` lies outside."""
    if len(images) > _MOVED_AT_ONCE:
        parts = zip(images.split(_MOVED_AT_ONCE), matrices.split(_MOVED_AT_ONCE), strict=True)
        return torch.cat([_moved(*part) for part in parts])
    batch, _, height, width = images.shape
    down, across = (torch.arange(side, device=images.device).double() + 0.5 for side in (height, width))
    a, b, c, d, e, f = matrices.T[:, :, None, None]
    x, y = a * across + b * down[:, None] + c, d * across + e * down[:, None] + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = (x - 0.5).floor()[:, None], (y - 0.5).floor()[:, None]
    steps = torch.arange(-1, 3, device=images.device)[:, None, None]
    columns, rows = (left.long() + steps).clamp(0, width - 1), (top.long() + steps).clamp(0, height - 1)
    at = (rows[:, :, None] * width + columns[:, None]).view(batch, 1, -1).expand(-1, 3, -1)
    taps = images.flatten(2).gather(2, at).double().view(batch, 3, 4, 4, height, width)
    lines = _between(taps.unbind(3), (x[:, None] - 0.5 - left)[:, None])
    moved = _between(lines.unbind(2), y[:, None] - 0.5 - top).clamp_(0, 255)
    ground = torch.tensor(PADDING, dtype=torch.float32)[:, None, None].to(images.device)
    return torch.where(inside[:, None], moved, ground).to(torch.uint8)


def _between(taps: Sequence[Tensor], at: Tensor) -> Tensor:
    """Of four numbers in a row, what lies `at` 0..1 between the second and the third."""
    one, two, three, four = taps
    return two + at * (three - one + at * (2 * (one - two) + three - four + at * (two - one + four - three)))


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """Counter-clockwise around the centre, as Pillow's `Image.rotate`."""
    cos, sin = (round(part(-math.radians(degrees % 360)), 15) for part in (math.cos, math.sin))
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


_MATRICES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "rotate": _rotation,
    "shear_x": lambda factor, height, width: (1, factor, 0, 0, 1, 0),
    "shear_y": lambda factor, height, width: (1, 0, 0, factor, 1, 0),
    "translate_x_rel": lambda share, height, width: (1, 0, share * width, 0, 1, 0),
    "translate_y_rel": lambda share, height, width: (1, 0, 0, 0, 1, share * height),
    "translate_x_abs": lambda pixels, height, width: (1, 0, pixels, 0, 1, 0),
    "translate_y_abs": lambda pixels, height, width: (1, 0, 0, 0, 1, pixels),
}


def _blended(ground: Callable[[Tensor], Tensor]) -> Change:
    """Pillow's `ImageEnhance`: away from a ground, [B, 3 or 1, H or 1, W or 1] float32, by a factor."""

    def change(images: Tensor, factors: Tensor) -> Tensor:
        factor, far = factors.float()[:, :, None, None], images.float()
        near = ground(images)
        return (near + factor * (far - near)).clamp_(0, 255).to(torch.uint8)

    return change


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.int().unbind(1)
    grey = (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 2**15) >> 16
    return grey[:, None].float()


def _smooth(images: Tensor) -> Tensor:
    """Pillow's `ImageFilter.SMOOTH`; the outermost pixels stay."""
    smooth = images.float()
    around = F.avg_pool2d(smooth, 3, 1, divisor_override=1)  # sums, so exact
    smooth[..., 1:-1, 1:-1] = ((around + 4 * smooth[..., 1:-1, 1:-1]) / 13 + 0.5).floor()
    return smooth


def _mean_grey(images: Tensor) -> Tensor:
    return (_grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float()


def _mapped(table: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """A new value for each value: `table` gives [B, 1 or 3, 256] of images and arguments."""

    def change(images: Tensor, arguments: Tensor) -> Tensor:
        values = table(images, arguments).clamp(0, 255).to(torch.uint8).expand(len(images), 3, -1)
        return values.gather(2, images.flatten(2).long()).view_as(images)

    return change


def _levels(like: Tensor) -> Tensor:
    return torch.arange(256, device=like.device)[None, None]


def _solarized(images: Tensor, threshold: Tensor) -> Tensor:
    levels = _levels(images)
    return torch.where(levels < threshold[..., None], levels, 255 - levels)


def _solarized_by_adding(images: Tensor, more: Tensor) -> Tensor:
    levels = _levels(images)
    return torch.where(levels < 128, levels + more[..., None].long(), levels)


def _posterized(images: Tensor, bits: Tensor) -> Tensor:
    step = 2 ** (8 - bits.clamp(0, 8).long())[..., None]
    return _levels(images) // step * step


def _contrasted(images: Tensor, arguments: Tensor) -> Tensor:
    """Pillow's `ImageOps.autocontrast`."""
    flat = images.flatten(2)
    low, high = (end.double()[..., None] for end in (flat.amin(2), flat.amax(2)))
    scale = torch.full_like(low, 255) / (high - low)  # a number over a tensor would be rounded twice
    levels = _levels(images).double()
    return torch.where(high > low, (levels * scale - low * scale).trunc(), levels)


def _equalized(images: Tensor, arguments: Tensor) -> Tensor:
    """Pillow's `ImageOps.equalize`."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    below = counts.cumsum(2) - counts
    step = below.gather(2, flat.amax(2, keepdim=True)) // 255
    return torch.where(step > 0, (step // 2 + below) // step.clamp(min=1), _levels(images))


_CHANGES: dict[str, Change] = {
    "brightness": _blended(lambda images: torch.zeros(1, device=images.device)),
    "contrast": _blended(_mean_grey),
    "color": _blended(_grey),
    "sharpness": _blended(_smooth),
    "auto_contrast": _mapped(_contrasted),
    "equalize": _mapped(_equalized),
    "invert": _mapped(lambda images, arguments: 255 - _levels(images)),
    "solarize": _mapped(_solarized),
    "solarize_add": _mapped(_solarized_by_adding),
    "posterize": _mapped(_posterized),
}
