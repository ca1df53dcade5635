"""DeiT's views of single images: random resized crop, flip and RandAugment as timm has them, seeded from outside.

timm's draws come from global generators, which are seeded for each image and put back after the last. The crop's
place is timm's; PyTorch resizes it, on bytes and some times faster than Pillow. It rounds its weights to 16 bits, so
single pixels differ by a few grey levels, and their mean by a hundredth of one. Rotating, shearing and shifting are
Pillow's to the bit, but faster (`warp`).
"""

from coadvise import torchvision_guard  # noqa: F401  # isort: skip  (before anything that imports torchvision)

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import (
    AugmentOp,
    AugMixAugment,
    AutoAugment,
    RandAugment,
    posterize,
    rotate,
    shear_x,
    shear_y,
    translate_x_abs,
    translate_x_rel,
    translate_y_abs,
    translate_y_rel,
)
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from coadvise.config import AugmentConfig
from coadvise.data.images import Pixels
from coadvise.data.warp import Warped

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # DeiT fills with it where a move leaves nothing
IMAGENET_STD = (0.229, 0.224, 0.225)
WARPS = (rotate, shear_x, shear_y, translate_x_abs, translate_x_rel, translate_y_abs, translate_y_rel)


class Pipeline:
    """Views of images of any size."""

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        whole = create_transform(
            image_size, is_training=True, scale=augment.crop_scale, hflip=0.5 if augment.flip else 0.0,
            color_jitter=None, auto_augment=augment.rand_augment, interpolation="bicubic", re_prob=0.0,
            mean=IMAGENET_MEAN, normalize=False,
        )  # fmt: skip
        take_no_bits(whole)
        _warp_fast(whole)
        self.image_size = image_size
        self._crop, *self._rest, to_tensor = whole.transforms
        assert isinstance(self._crop, RandomResizedCropAndInterpolation), "timm's pipeline no longer begins with it"
        assert isinstance(to_tensor, MaybePILToTensor), "timm's pipeline no longer ends with it"

    def views(self, images: Iterable[Image.Image | Pixels], seeds: Sequence[int]) -> Tensor:
        """[B, 3, S, S] float32 in 0..1, the view of each image a function of its seed.

        Args:
            images: decoded, or arrays [H, W, 3]; each is asked for before its seed.
        """
        out = torch.empty(len(seeds), 3, self.image_size, self.image_size)
        with _global_generators_put_back():
            for row, image, seed in zip(out, images, seeds, strict=True):
                view = torch.from_numpy(self._view(image, seed)).permute(2, 0, 1)
                row.copy_(view.contiguous()).div_(255)  # one after the other, while it is in the processor's cache
        return out

    def _view(self, image: Image.Image | Pixels, seed: int) -> Pixels:
        """[S, S, 3]."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        whole = image if isinstance(image, Image.Image) else torch.from_numpy(image).permute(2, 0, 1)
        top, left, height, width = self._crop.get_params(whole, self._crop.scale, self._crop.ratio)
        if isinstance(whole, Image.Image):
            region = pil_to_tensor(whole.crop((left, top, left + width, top + height)))[None]
        else:
            region = whole[None, :, top : top + height, left : left + width]
        region = region.contiguous(memory_format=torch.channels_last)  # its bytes resize fastest side by side
        square = (self.image_size, self.image_size)
        resized = F.interpolate(region, square, mode="bicubic", antialias=True)[0]
        result: Any = Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())
        for transform in self._rest:
            result = transform(result)
        return np.array(result)


def take_no_bits(transform: Any) -> None:
    """Has timm's RandAugment keep no bits of an image where it draws that: black. Pillow refuses it from 13 on."""
    for operation in _operations(transform):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _warp_fast(transform: Any) -> None:
    for operation in _operations(transform):
        if operation.aug_fn in WARPS:
            operation.aug_fn = partial(_through_warped, operation.aug_fn)


def _operations(transform: Any) -> Iterator[AugmentOp]:
    """Those that RandAugment and its kin in a pipeline of timm draw from."""
    for part in transform.transforms:
        if isinstance(part, RandAugment | AugMixAugment):
            yield from part.ops
        elif isinstance(part, AutoAugment):
            for policy in part.policy:
                yield from policy


def _through_warped(operation: Callable[..., Image.Image], image: Image.Image, *args: Any, **about: Any) -> Image.Image:
    return operation(Warped(image), *args, **about)


def _posterize(image: Image.Image, bits: int, **about: Any) -> Image.Image:
    return posterize(image, bits, **about) if bits > 0 else Image.new(image.mode, image.size)


@contextmanager
def _global_generators_put_back() -> Iterator[None]:
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
