"""DeiT's views of single images: random resized crop, flip and RandAugment as timm makes them, each from a seed.

timm draws from the global generators, which are seeded for each image and restored after the last. timm chooses the
crop; PyTorch resizes it, on bytes and several times faster than Pillow. It rounds its weights to 16 bits, so single
pixels differ by a few grey levels, and the mean by a hundredth of one.
"""

from coadvise import torchvision_guard  # noqa: F401  # isort: skip  (before anything that imports torchvision)

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from coadvise.config import AugmentConfig
from coadvise.data.images import Pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # DeiT fills with it what a shift or rotation leaves empty
IMAGENET_STD = (0.229, 0.224, 0.225)


class Pipeline:
    """Views of images of any size."""

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        whole = create_transform(
            image_size, is_training=True, scale=augment.crop_scale, hflip=0.5 if augment.flip else 0.0,
            color_jitter=None, auto_augment=augment.rand_augment, interpolation="bicubic", re_prob=0.0,
            mean=IMAGENET_MEAN, normalize=False,
        )  # fmt: skip
        allow_no_bits(whole)
        self.image_size = image_size
        self._crop, *self._rest, to_tensor = whole.transforms
        assert isinstance(self._crop, RandomResizedCropAndInterpolation), "timm's pipeline no longer begins with it"
        assert isinstance(to_tensor, MaybePILToTensor), "timm's pipeline no longer ends with it"

    def views(self, images: Iterable[tuple[Image.Image | Pixels, int]], count: int) -> Tensor:
        """[B, 3, S, S] float32 in 0..1, the view of each image a function of its seed.

        Args:
            images: B pairs of a decoded image, or an array [H, W, 3], and its seed.
            count: B.
        """
        out = torch.empty(count, 3, self.image_size, self.image_size)
        with _global_generators_restored():
            for row, (image, seed) in zip(out, images, strict=True):
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
        region = region.contiguous(memory_format=torch.channels_last)  # resizes fastest with the channels together
        square = (self.image_size, self.image_size)
        resized = F.interpolate(region, square, mode="bicubic", antialias=True)[0]
        result: Any = Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())
        for transform in self._rest:
            result = transform(result)
        return np.array(result)


def allow_no_bits(transform: Any) -> None:
    """Makes timm's RandAugment return black where it draws to keep 0 bits of an image, which Pillow 13 refuses."""
    for operation in _operations(transform):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _operations(transform: Any) -> Iterator[AugmentOp]:
    """Those from which the RandAugment, AugMix or AutoAugment of a timm pipeline draws."""
    for part in transform.transforms:
        if isinstance(part, RandAugment | AugMixAugment):
            yield from part.ops
        elif isinstance(part, AutoAugment):
            for policy in part.policy:
                yield from policy


def _posterize(image: Image.Image, bits: int, **about: Any) -> Image.Image:
    return posterize(image, bits, **about) if bits > 0 else Image.new(image.mode, image.size)


@contextmanager
def _global_generators_restored() -> Iterator[None]:
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
