"""DeiT's views of single images: random resized crop, flip and RandAugment as timm makes them, each from a seed.

timm draws from Python's global generator, in whose place it finds one of ours meanwhile: other threads draw from
Python's at any time, such as one that waits before it asks a server again. NumPy's and PyTorch's global generators are
seeded for each image and restored after the last. timm chooses the crop; PyTorch resizes it, on bytes and several times
faster than Pillow. It rounds its weights to 16 bits, so single pixels differ by a few grey levels, and the mean by a
hundredth of one.
"""

from coadvise import torchvision_guard  # noqa: F401  # isort: skip  (before anything that imports torchvision)

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment, create_transform, transforms
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Compose, RandomHorizontalFlip
from torchvision.transforms.functional import pil_to_tensor

from coadvise.config.schema import AugmentConfig, Fit, ImageSize, sides
from coadvise.data.images import PADDING, DecodedImage, Need, Pixels, fitted_size
from coadvise.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # DeiT fills with it what a shift or rotation leaves empty
IMAGENET_STD = (0.229, 0.224, 0.225)


_DRAWS = random.Random()  # timm's, while views are made
Operation = tuple[str, float]  # of RandAugment: the name of timm's function, and its argument, 0 where it has none


class Drawn(NamedTuple):
    """What is drawn for a view.

    Attributes:
        region: [H, W, 3], what the view shows of the image, to be resized.
        box: where that comes to lie in the view: top, left, height, width. Beside it is `PADDING`.
        mirrored: left and right, afterwards.
        operations: what is done to it then, in this order.
    """

    region: Pixels
    box: tuple[int, int, int, int]
    mirrored: bool
    operations: tuple[Operation, ...]


class Pipeline:
    """Views of images of any size.

    With `crop` a random region's shape varies around the network's, with `pad` and `stretch` around the picture's own;
    the region is then resized, and padded, as the picture is for scoring.

    Attributes:
        operations: those that views may be changed by, as timm's functions are called; AugMix is one.
    """

    def __init__(self, augment: AugmentConfig, image_size: ImageSize, fit: Fit = "crop") -> None:
        self.image_size, self.fit = image_size, fit
        self.height, self.width = sides(image_size)
        whole = create_transform(
            (3, self.height, self.width), is_training=True, scale=augment.crop_scale,
            hflip=0.5 if augment.flip else 0.0, color_jitter=None, auto_augment=augment.rand_augment,
            interpolation="bicubic", re_prob=0.0, mean=IMAGENET_MEAN, normalize=False,
        )  # fmt: skip
        allow_no_bits(whole)
        self._crop, *self._rest, to_tensor = whole.transforms
        self._recorders = [_recorder(transform) for transform in self._rest]
        self.operations = frozenset(map(_name, _operations(whole)))
        if any(isinstance(transform, AugMixAugment) for transform in self._rest):
            self.operations |= {"augmix"}
        assert isinstance(self._crop, RandomResizedCropAndInterpolation), "timm's pipeline no longer begins with it"
        assert isinstance(to_tensor, MaybePILToTensor), "timm's pipeline no longer ends with it"

    def views(self, images: Iterable[tuple[DecodedImage | Image.Image | Pixels, int]], count: int) -> Tensor:
        """[B, 3, H, W] float32 in 0..1, the view of each image a function of its seed.

        Args:
            images: B pairs of a decoded image, which may be reduced as `need` says, or an array [H, W, 3], and its
                seed.
            count: B.
        """
        out = torch.empty(count, 3, self.height, self.width)
        with _generators():
            for row, (image, seed) in zip(out, images, strict=True):
                view = torch.from_numpy(self._view(image, seed)).permute(2, 0, 1)
                row.copy_(view.contiguous()).div_(255)  # one after the other, while it is in the processor's cache
        return out

    def drawn(self, images: Iterable[tuple[Pixels, int]]) -> list[Drawn]:
        """What `views` draws for images [H, W, 3] from their seeds, and the region that each view shows."""
        with _generators():
            return [self._drawn(image, seed) for image, seed in images]

    def need(self, seed: int) -> Need:
        """What a view needs of a picture: so many pixels that its region is not enlarged more than it has to be."""

        def need(width: int, height: int) -> tuple[float, float]:
            with _own_draws():
                _DRAWS.seed(seed)
                _, _, down, across = self._region(width, height)
            wide, tall = self._inner(width, height)
            return width * wide / across, height * tall / down

        return need

    def _inner(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that the region of a picture is resized to."""
        return (
            (self.width, self.height) if self.fit == "crop" else fitted_size(width, height, self.image_size, self.fit)
        )

    def _region(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random region, by timm from `_DRAWS`."""
        aspect = self.width / self.height if self.fit == "crop" else width / height
        low, high = self._crop.ratio
        blank = torch.empty(3, height, width, device="meta")  # timm asks it for its size
        top, left, down, across = self._crop.get_params(blank, self._crop.scale, (low * aspect, high * aspect))
        return top, left, down, across

    def _drawn(self, image: Pixels, seed: int) -> Drawn:
        _seed_generators(seed)
        size = (image.shape[1], image.shape[0])
        top, left, height, width = self._region(*size)
        wide, tall = self._inner(*size)
        box = ((self.height - tall) // 2, (self.width - wide) // 2, tall, wide)
        mirrored, operations = False, tuple[Operation, ...]()
        for transform in self._recorders:
            if isinstance(transform, RandomHorizontalFlip):
                mirrored = bool(transform(torch.tensor([[0, 1]]))[0, 0])
            else:
                operations = transform(operations)
        return Drawn(image[top : top + height, left : left + width], box, mirrored, operations)

    def _view(self, image: DecodedImage | Image.Image | Pixels, seed: int) -> Pixels:
        """[H, W, 3]."""
        _seed_generators(seed)
        if isinstance(image, np.ndarray):
            size = (image.shape[1], image.shape[0])
            top, left, height, width = self._region(*size)
            region = torch.from_numpy(image[top : top + height, left : left + width]).permute(2, 0, 1)
            result: Any = resized(region, self._inner(*size))
        else:
            picture, size = (image.image, image.size) if isinstance(image, DecodedImage) else (image, image.size)
            top, left, height, width = self._region(*size)
            box = (left, top, left + width, top + height)
            if picture.size == size:
                result = resized(pil_to_tensor(picture.crop(box)), self._inner(*size))
            else:  # reduced, so that the region's edges lie between pixels, which only Pillow allows
                across, down = picture.width / size[0], picture.height / size[1]
                right, bottom = min(box[2] * across, picture.width), min(box[3] * down, picture.height)
                edges = (left * across, top * down, right, bottom)
                result = picture.resize(self._inner(*size), Image.Resampling.BICUBIC, edges)
        if self.fit == "pad":
            ground = Image.new("RGB", (self.width, self.height), PADDING)
            ground.paste(result, ((self.width - result.width) // 2, (self.height - result.height) // 2))
            result = ground
        for transform in self._rest:
            result = transform(result)
        return np.array(result)


def resized(region: Tensor, size: tuple[int, int]) -> Image.Image:
    """A region [3, H, W] uint8 as an image of that width and height."""
    region = region[None].contiguous(memory_format=torch.channels_last)  # resizes fastest with the channels together
    whole = F.interpolate(region, size[::-1], mode="bicubic", antialias=True)[0]
    return Image.fromarray(whole.permute(1, 2, 0).contiguous().numpy())


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


def _name(operation: AugmentOp) -> str:
    return operation.aug_fn.__name__.lstrip("_")


def _recorder(transform: Any) -> Any:
    """A copy of a timm transform that adds the operations it draws to a tuple, where it would change an image."""
    copy = deepcopy(transform)
    for operation in _operations(Compose([copy])):
        operation.aug_fn = partial(_record, _name(operation))
    return copy


def _record(name: str, before: tuple[Operation, ...], argument: float = 0, **about: Any) -> tuple[Operation, ...]:
    return (*before, (name, argument))


def _posterize(image: Image.Image, bits: int, **about: Any) -> Image.Image:
    return posterize(image, bits, **about) if bits > 0 else Image.new(image.mode, image.size)


def _seed_generators(seed: int) -> None:
    _DRAWS.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def _own_draws() -> Iterator[None]:
    """timm's `random` is `_DRAWS`."""
    before = transforms.random, auto_augment.random
    transforms.random = auto_augment.random = _DRAWS
    try:
        yield
    finally:
        transforms.random, auto_augment.random = before


def check_notation(augment: AugmentConfig) -> None:
    """Raises UserError for a `rand_augment` that timm does not read."""
    try:
        Pipeline(augment, 32)
    except (AssertionError, ValueError, LookupError):
        raise UserError(
            f"augment.rand_augment={augment.rand_augment} is not timm's notation; give one such as "
            "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original"
        ) from None


@contextmanager
def _generators() -> Iterator[None]:
    """Python's global generator is left alone, NumPy's and PyTorch's are restored."""
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    try:
        with _own_draws():
            yield
    finally:
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
