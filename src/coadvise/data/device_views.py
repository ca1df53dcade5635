"""DeiT's views of presized images, made in batches on a device: the CPU's views, to the rounding of single pixels.

Loader processes draw what the CPU's pipeline would, with timm's own code, and hand over those numbers and the bytes of
each view's region. The device resizes, mirrors and changes them all at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coadvise.config.schema import AugmentConfig, RunConfig
from coadvise.data.device_ops import LARGEST, augment_, resized, unknown
from coadvise.data.erasing import Patch, erase_
from coadvise.data.images import Pixels
from coadvise.data.pipeline import Drawn, Operation, Pipeline
from coadvise.data.pipeline import resized as resized_alone
from coadvise.errors import UserError

DEVICE_VIEWS = 1  # raise it with every change of what a device makes; stored logits of older views are then refused
_AT_ONCE = 64  # pictures resized together; their floats take 170 MB with regions of 288 x 384 pixels


class Singles(NamedTuple):
    """What a device makes B views of, in the host's memory.

    Attributes:
        pixels: [B, H, W, 3] uint8, each region in the top left corner of its place; what is beside it has no effect.
        shapes: [B, 7] int64: a region's height and width; top, left, height and width of what it becomes part of a
            view; 1 if that is mirrored.
        operations: of each view, in order.
        erased: where noise is put: the view's row, top, left, height, width.
        noise: all of it, one after the other, float32.
    """

    pixels: Tensor
    shapes: Tensor
    operations: Sequence[Sequence[Operation]]
    erased: Sequence[tuple[int, int, int, int, int]]
    noise: Tensor

    def pin_memory(self) -> "Singles":
        """Copies from pinned memory to a CUDA device are asynchronous."""
        return self._replace(
            pixels=self.pixels.pin_memory(), shapes=self.shapes.pin_memory(), noise=self.noise.pin_memory()
        )


def singles_of(drawn: Sequence[Drawn], erased: Iterable[Patch]) -> Singles:
    """Views that are drawn, packed for the way to a device."""
    regions = [_region(one) for one in drawn]
    tall, wide = (max(region.shape[axis] for region in regions) for axis in (0, 1))
    pixels = torch.empty(len(drawn), tall, wide, 3, dtype=torch.uint8)
    for place, region in zip(pixels.numpy(), regions, strict=True):
        place[: region.shape[0], : region.shape[1]] = region
    shapes = [(*region.shape[:2], *one.box, one.mirrored) for region, one in zip(regions, drawn, strict=True)]
    patches = [*erased]
    noise = torch.cat([patch.noise.flatten() for patch in patches]) if patches else torch.empty(0)
    places = [(patch.row, patch.top, patch.left, *patch.noise.shape[1:]) for patch in patches]
    return Singles(pixels, torch.tensor(shapes), [one.operations for one in drawn], places, noise)


def _region(drawn: Drawn) -> Pixels:
    """What goes over: bytes of the image, or, where the view is less than half as large, the resized ones."""
    _, _, tall, wide = drawn.box
    height, width, _ = drawn.region.shape
    if height <= LARGEST * tall and width <= LARGEST * wide:
        return drawn.region
    return np.asarray(resized_alone(torch.from_numpy(drawn.region).permute(2, 0, 1), (wide, tall)))


def made(singles: Singles, size: tuple[int, int], device: torch.device) -> Tensor:
    """The views [B, 3, *size] float32 in 0..1, on a device, before mixing."""
    pixels, shapes = (there.to(device, non_blocking=True) for there in (singles.pixels, singles.shapes))
    parts = zip(pixels.split(_AT_ONCE), shapes.split(_AT_ONCE), strict=True)
    bytes_ = torch.cat([resized(some, at[:, :2], at[:, 2:6], at[:, 6] > 0, size) for some, at in parts])
    augment_(bytes_, singles.operations)
    images = bytes_.float().div_(255)
    for patch in _patches(singles, device):
        erase_(images, patch)
    return images


def _patches(singles: Singles, device: torch.device) -> Iterator[Patch]:
    noise, start = singles.noise.to(device, non_blocking=True), 0
    for row, top, left, height, width in singles.erased:
        stop = start + 3 * height * width
        yield Patch(row, top, left, noise[start:stop].view(3, height, width))
        start = stop


def views_place(config: RunConfig, cuda: bool) -> str:
    """What `data.views` means for a run: "device", or "cpu".

    Args:
        cuda: whether its networks are on a CUDA device.

    Raises:
        UserError: `data.views` is device, and an operation of RandAugment is not known there.
    """
    augments = [config.augment, *(teacher.augment for teacher in config.teachers.values() if teacher.augment)]
    deit = [augment for augment in augments if augment.kind == "deit"]
    wanted = config.data.views == "device" or (config.data.views == "auto" and cuda and config.data.presize > 0)
    if not wanted or not deit:
        return "cpu"
    for augment in deit:
        if missing := _unknown(augment):
            if config.data.views == "auto":
                return "cpu"
            raise UserError(
                f"data.views=device does not know {', '.join(missing)} of rand_augment={augment.rand_augment}; use "
                "data.views=cpu, or a set of operations without it, such as rand-m9-mstd0.5-inc1"
            )
    return "device"


def _unknown(augment: AugmentConfig) -> list[str]:
    return unknown(Pipeline(augment, 32).operations)
