"""DeiT's pipeline is timm's but for the resizing's rounding; each view is a function of its seed."""

import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image, ImageFilter
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment, posterize
from torch import Tensor

from coadvise.config import AugmentConfig
from coadvise.data.pipeline import Pipeline, allow_no_bits

PLAIN = AugmentConfig(kind="deit", rand_augment="")
DEIT = AugmentConfig(kind="deit")


def textures(count: int, width: int = 60, height: int = 45) -> list[Image.Image]:
    """Images with edges and gradients, as photographs have."""
    rng = np.random.default_rng(0)
    noise = (Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count))
    return [image.filter(ImageFilter.GaussianBlur(1.5)) for image in noise]


def timms(images: list[Image.Image], rand_augment: str | None) -> list[Tensor]:
    """The same views by timm's own pipeline, with the defaults of DeiT's main.py."""
    pipeline = timm.data.create_transform(
        32, is_training=True, color_jitter=0.4 if rand_augment else None, auto_augment=rand_augment, re_prob=0.0,
        interpolation="bicubic", normalize=False,
    )  # fmt: skip
    allow_no_bits(pipeline)
    views = []
    for seed, image in enumerate(images):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        views.append(pipeline(image).float() / 255)
    return views


def test_crops_and_flips_are_timm_s_up_to_rounding() -> None:
    images = textures(40)
    ours = Pipeline(PLAIN, 32).views(zip(images, range(40), strict=True), 40)
    difference = (ours - torch.stack(timms(images, None))).abs() * 255
    assert difference.mean() < 0.1  # grey levels
    assert difference.max() < 8


def test_rand_augment_is_timm_s_with_the_same_draws() -> None:
    """Most operations keep a rounding small; equalising, posterising and sharpening make more of it."""
    images = textures(60)
    ours = Pipeline(DEIT, 32).views(zip(images, range(60), strict=True), 60)
    theirs = torch.stack(timms(images, DEIT.rand_augment))
    difference = (ours - theirs).abs().mean((1, 2, 3)) * 255
    assert (difference < 0.2).float().mean() > 0.8
    assert difference.max() < 8
    plain = torch.stack(timms(images, None))
    assert ((theirs - plain).abs().mean((1, 2, 3)) * 255 > 10).float().mean() > 0.4  # it does something


def test_how_much_is_cropped_and_whether_it_is_flipped_are_the_configuration_s() -> None:
    ramp = Image.fromarray(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2))
    for flip, shown in ((False, 0), (True, 20)):
        augment = PLAIN.model_copy(update={"crop_scale": (1.0, 1.0), "flip": flip})
        views = Pipeline(augment, 32).views(zip([ramp] * 40, range(40), strict=True), 40)
        whole = torch.from_numpy(np.array(ramp)).permute(2, 0, 1).float() / 255
        mirrored = (views == whole.flip(2)).flatten(1).all(1)
        assert ((views == whole).flatten(1).all(1) ^ mirrored).all()
        assert abs(int(mirrored.sum()) - shown) <= 10 * flip


def test_an_array_and_an_image_of_the_same_pixels_give_the_same_view() -> None:
    images = textures(20)
    arrays = [np.array(image) for image in images]
    pipeline = Pipeline(DEIT, 24)
    assert torch.equal(*(pipeline.views(zip(given, range(20), strict=True), 20) for given in (images, arrays)))


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "original-mstd0.5", "augmix-m9"])
def test_no_draw_stops_the_pipeline(name: str) -> None:
    """timm posterises to no bits now and then, which Pillow refuses from 13 on."""
    pipeline = timm.data.create_transform(8, is_training=True, auto_augment=name, normalize=False, color_jitter=None)
    allow_no_bits(pipeline)
    parts = [part for part in pipeline.transforms if isinstance(part, AutoAugment | RandAugment | AugMixAugment)]
    assert len(parts) == 1
    listed = parts[0].policy if isinstance(parts[0], AutoAugment) else [parts[0].ops]
    found = [operation for operations in listed for operation in operations if "Posterize" in operation.name]
    assert found
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    for operation in found:
        assert operation.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
        assert operation.aug_fn(image, 3).tobytes() == posterize(image, 3).tobytes()


def test_images_of_any_size_and_form() -> None:
    images = [Image.new("RGB", size, (10, 200, 30)) for size in ((1, 1), (1, 40), (300, 2), (7, 7), (64, 48))]
    views = Pipeline(PLAIN, 16).views(zip(images, range(5), strict=True), 5)
    assert views.shape == (5, 3, 16, 16)
    assert torch.allclose(views * 255, torch.tensor([10.0, 200, 30])[:, None, None].expand_as(views), atol=1)
