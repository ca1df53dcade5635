"""DeiT's pipeline is timm's but for the resizing's rounding; each view is a function of its seed."""

import random
import threading

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image, ImageFilter
from samples import encoded
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment, posterize
from torch import Tensor

from coadvise.config.schema import AugmentConfig, Fit
from coadvise.data import images as decoding
from coadvise.data.images import PADDING, decode_image, fitted, to_array
from coadvise.data.pipeline import Pipeline, allow_no_bits, check_notation
from coadvise.errors import UserError

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


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_view_of_all_of_a_picture_is_what_is_scored(fit: Fit) -> None:
    augment = PLAIN.model_copy(update={"crop_scale": (1.0, 1.0), "flip": False})
    shapes = ((60, 24), (100, 40)) if fit == "crop" else ((60, 24), (33, 60), (96, 30))  # only the network's is cropped
    images, size = [textures(1, *shape)[0] for shape in shapes], (16, 40)
    views = Pipeline(augment, size, fit).views(zip(images, range(len(images)), strict=True), len(images))
    scored = torch.from_numpy(np.stack([to_array(fitted(image, size, fit)) for image in images]))
    assert views.shape == (len(images), 3, *size)
    assert (views * 255 - scored).abs().mean() < 0.5  # Pillow's rounding and PyTorch's
    if fit == "pad":
        ground = (scored == torch.tensor(PADDING)[:, None, None]).all(1)
        assert ground.any()
        assert torch.equal((views * 255).round().movedim(1, -1)[ground], scored.float().movedim(1, -1)[ground])


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_regions_vary_around_the_shape_of_what_they_become(fit: Fit) -> None:
    pipeline, shapes = Pipeline(PLAIN, (16, 64), fit), []
    for seed in range(300):
        random.seed(seed)
        _, _, height, width = pipeline._region(400, 200)
        shapes.append(width / height)
    around = 4 if fit == "crop" else 2
    assert around * 3 / 4 * 0.95 < min(shapes)
    assert max(shapes) < around * 4 / 3 * 1.05
    assert abs(np.exp(np.log(shapes).mean()) / around - 1) < 0.1


def test_a_reduced_picture_gives_the_view_of_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LARGE", 100 * 100)
    content = encoded(textures(1, 512, 384)[0], "JPEG", quality=95)
    pipeline, seeds = Pipeline(PLAIN, (16, 24)), range(12)
    whole, reduced = (
        [decode_image(content, "", pipeline.need(seed) if ample else None) for seed in seeds] for ample in (False, True)
    )
    assert len({seen.image.size for seen in reduced}) > 1, "as much as the region of each view needs"
    assert max(seen.image.width for seen in reduced) <= 256
    for seed, seen in zip(seeds, reduced, strict=True):
        least = pipeline.need(seed)(512, 384)
        assert all(side >= 2 * need for side, need in zip(seen.image.size, least, strict=True))
    state = random.getstate()
    one, other = (pipeline.views(zip(seen, seeds, strict=True), 12) for seen in (whole, reduced))
    assert random.getstate() == state
    assert (one - other).abs().mean() * 255 < 1
    pixels = Pipeline(PLAIN, (16, 24)).views([(whole[0].image, 0)], 1)
    assert torch.equal(pixels, one[:1]), "an image that is not reduced needs no more"


def test_nobody_else_s_draws_change_a_view() -> None:
    """Other threads draw from Python's generator while views are made; what it gives next is not changed either."""
    images, pipeline = [*zip(textures(20), range(20), strict=True)], Pipeline(DEIT, 32)
    before = random.getstate()
    expected = pipeline.views(images, 20)
    assert random.getstate() == before
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            random.random()

    other = threading.Thread(target=draw)
    other.start()
    try:
        found = [pipeline.views(images, 20) for _ in range(20)]
    finally:
        stop.set()
        other.join()
    assert all(torch.equal(expected, views) for views in found)


def test_images_of_any_size_and_form() -> None:
    images = [Image.new("RGB", size, (10, 200, 30)) for size in ((1, 1), (1, 40), (300, 2), (7, 7), (64, 48))]
    views = Pipeline(PLAIN, 16).views(zip(images, range(5), strict=True), 5)
    assert views.shape == (5, 3, 16, 16)
    assert torch.allclose(views * 255, torch.tensor([10.0, 200, 30])[:, None, None].expand_as(views), atol=1)


def test_a_notation_that_timm_does_not_read_is_refused() -> None:
    for notation in ("rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original"):
        check_notation(AugmentConfig(kind="deit", rand_augment=notation))
    for notation in ("foo", "rand-m9-x3"):
        with pytest.raises(UserError, match="is not timm's notation; give one such as rand-m9-mstd0"):
            check_notation(AugmentConfig(kind="deit", rand_augment=notation))
