"""Operations on a batch give what Pillow and PyTorch give for each picture, to the rounding of single values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from coadvise.config.schema import AugmentConfig
from coadvise.data.device_ops import augment_, resized, unknown
from coadvise.data.images import PADDING, Pixels
from coadvise.data.pipeline import Pipeline, _posterize
from coadvise.data.pipeline import resized as resized_alone

PHOTOS = sorted(Path(__file__).parents[1].glob("photos/train/*/*.jpg"))
ARGUMENTS: dict[str, Callable[[np.random.Generator], float]] = {
    "rotate": lambda rng: rng.uniform(-200, 200),
    **dict.fromkeys(("shear_x", "shear_y"), lambda rng: rng.uniform(-0.3, 0.3)),
    **dict.fromkeys(("translate_x_rel", "translate_y_rel"), lambda rng: rng.uniform(-0.5, 0.5)),
    **dict.fromkeys(("translate_x_abs", "translate_y_abs"), lambda rng: rng.uniform(-60, 60)),
    **dict.fromkeys(("brightness", "contrast", "color", "sharpness"), lambda rng: rng.uniform(0, 2)),
    **dict.fromkeys(("auto_contrast", "equalize", "invert"), lambda rng: 0),
    "solarize": lambda rng: rng.integers(0, 257),
    "solarize_add": lambda rng: rng.integers(0, 111),
    "posterize": lambda rng: rng.integers(0, 9),
}


@pytest.fixture(scope="module")
def pictures() -> list[Pixels]:
    """Photographs of 56 x 48 pixels, one of few colours, and two of one colour."""
    whole = [Image.open(path).convert("RGB").resize((56, 48)) for path in PHOTOS[::3]]
    few = Image.fromarray(np.random.default_rng(0).integers(100, 103, (48, 56, 3), dtype=np.uint8))
    return [np.asarray(image) for image in (*whole, few, *(Image.new("RGB", (56, 48), c) for c in ("black", "teal")))]


def batch_of(pictures: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def by_timm(picture: Pixels, *operations: tuple[str, float]) -> Pixels:
    image = Image.fromarray(picture)
    for name, argument in operations:
        function = _posterize if name == "posterize" else getattr(auto_augment, name)
        arguments = () if name in ("auto_contrast", "equalize", "invert") else (argument,)
        image = function(image, *arguments, fillcolor=PADDING, resample=Image.Resampling.BICUBIC)
    return np.asarray(image)


def assert_as_close_as_rounding(got: Tensor, wanted: Tensor) -> None:
    difference = (got.int() - wanted.int()).abs().float()
    assert difference.max() <= 1
    assert difference.mean() < 0.01


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_operation_is_pillow_s(name: str, pictures: list[Pixels]) -> None:
    rng = np.random.default_rng(0)
    drawn = [(name, ARGUMENTS[name](rng)) for _ in pictures]
    images = batch_of(pictures)
    augment_(images, [[one] for one in drawn])
    assert_as_close_as_rounding(images, batch_of([*map(by_timm, pictures, drawn)]))


def test_every_picture_has_its_own_operations_in_its_own_order(pictures: list[Pixels]) -> None:
    one, other, third = ("solarize", 90), ("posterize", 2), ("invert", 0)
    drawn = [(one, other, third), (other, one), (), (third,), (third, one), (other,), (one,)]
    assert len(pictures) > len(drawn)
    drawn += [()] * (len(pictures) - len(drawn))
    images = batch_of(pictures)
    augment_(images, drawn)
    assert torch.equal(images, batch_of([by_timm(*each) for each in map(lambda p, d: (p, *d), pictures, drawn)]))
    assert not np.array_equal(by_timm(pictures[0], one, other), by_timm(pictures[0], other, one))


def test_more_pictures_than_are_moved_at_once(pictures: list[Pixels]) -> None:
    many = batch_of((pictures * 4)[:40])
    few = many[30:33].clone()
    augment_(many, [[("rotate", float(row))] for row in range(40)])
    augment_(few, [[("rotate", float(row))] for row in (30, 31, 32)])
    assert torch.equal(many[30:33], few)


@pytest.mark.parametrize(("name", "missing"), [
    ("rand-m9-mstd0.5-inc1", []), ("rand-m7-n3", []), ("rand-tweights", []), ("original-mstd0.5", []), ("v0r", []),
    ("", []), ("augmix-m9", ["augmix"]), ("3a", ["desaturate", "gaussian_blur_rand"]),
])  # fmt: skip
def test_what_timm_may_draw_is_known_or_named(name: str, missing: list[str]) -> None:
    assert unknown(Pipeline(AugmentConfig(kind="deit", rand_augment=name), 16).operations) == missing


@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 30))
def test_resizing_is_pytorch_s(seed: int, tall: int, wide: int) -> None:
    rng, shapes, pixels, wanted = np.random.default_rng(seed), [], np.full((6, 60, 60, 3), 255, np.uint8), []
    for place in pixels:
        inner = rng.integers(1, (tall + 1, wide + 1))
        height, width = rng.integers(1, 2 * inner + 1)
        top, left = rng.integers(0, (tall, wide) - inner + 1)
        mirrored = bool(rng.integers(2))
        region = place[:height, :width] = rng.integers(0, 256, (height, width, 3))
        shapes.append((height, width, top, left, *inner, mirrored))
        view = Image.new("RGB", (wide, tall), PADDING)
        bytes_ = torch.from_numpy(region.astype(np.uint8)).permute(2, 0, 1)
        view.paste(resized_alone(bytes_, (int(inner[1]), int(inner[0]))), (int(left), int(top)))
        wanted.append(np.asarray(view)[:, :: -1 if mirrored else 1])
    at = torch.tensor(np.array(shapes, np.int64))
    whole = resized(torch.from_numpy(pixels), at[:, :2], at[:, 2:6], at[:, 6] > 0, (tall, wide))
    assert_as_close_as_rounding(whole, batch_of(wanted))
    height, width = shapes[0][:2]  # alone, without anything beside it: sums in another order
    alone = torch.from_numpy(pixels[:1, :height, :width].copy())
    assert torch.equal(resized(alone, at[:1, :2], at[:1, 2:6], at[:1, 6] > 0, (tall, wide)), whole[:1])
