"""Corruptions: their contract, and a comparison with a public implementation if it is installed.

The public one is `imagecorruptions-imaug`, which uses NumPy's global generator: given a generator in the same state,
ours must give the same image. The others (impulse noise, glass blur, frost, elastic transform) were compared once, in
distribution or by the published formula; `CHANGES` pins the images that were compared.
"""

import importlib
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coadvise.errors import UserError
from coadvise.evaluation import corruptions
from coadvise.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt

STILL = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")  # nothing random
# Those of which each severity changes more than the one before, and those whose worst is not the furthest in squares.
ORDERED = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "zoom_blur", "brightness", "contrast")
ODD = ("elastic_transform", "pixelate", "frost")


def scene(size: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A synthetic image [3, S, S] with patches of colour, edges and fine grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    pixels[size // 4 : size // 2, size // 3 :] = rng.integers(0, 255, 3)
    grain = rng.integers(-12, 13, (size, size, 3))
    return (pixels + grain).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def distance(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    return float(np.square(one.astype(float) - other).mean())


@pytest.mark.parametrize("size", [(9, 9), (96, 96), (9, 40), (40, 14)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_size_gives_an_image_of_that_size_the_same_each_time(name: str, size: tuple[int, int]) -> None:
    image = np.ascontiguousarray(scene(max(size))[:, : size[0], : size[1]])
    before = image.copy()
    for severity in (1, 5):
        once, again = corrupt(image, name, severity, 3), corrupt(image, name, severity, 3)
        assert once.shape == image.shape
        assert once.dtype == np.uint8
        assert np.array_equal(once, again)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_and_seed_matter(name: str) -> None:
    images = [scene(32, seed) for seed in range(3)]
    damage = [np.mean([distance(image, corrupt(image, name, s, 1)) for image in images]) for s in SEVERITIES]
    assert min(damage) > 1
    assert name in ODD or damage[-1] > 1.3 * damage[0]
    assert name not in ORDERED or damage == sorted(damage)
    same = np.array_equal(corrupt(images[0], name, 3, 1), corrupt(images[0], name, 3, 2))
    assert same is (name in STILL)


@given(st.integers(0, 2**63 - 1))
def test_no_global_generator_is_read_or_moved(seed: int) -> None:
    image, state = scene(16), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    assert corrupt(image, "snow", 2, seed).shape == (3, 16, 16)
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]


# The changes to an image of 32 and of 96 pixels over all severities, by the code that matched the public one.
CHANGES = {
    "gaussian_noise": (124.43, 330.56), "shot_noise": (101.67, 343.73), "impulse_noise": (44.32, 156.44),
    "defocus_blur": (34.82, 68.94), "glass_blur": (92.14, 74.80), "motion_blur": (94.77, 147.98),
    "zoom_blur": (79.84, 85.84), "snow": (302.76, 659.75), "frost": (294.68, 451.12), "fog": (222.07, 318.15),
    "brightness": (228.33, 361.89), "contrast": (173.84, 219.98), "elastic_transform": (117.15, 120.67),
    "pixelate": (34.73, 41.28), "jpeg_compression": (67.20, 71.18),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_are_those_that_were_compared(name: str) -> None:
    """Without the public implementation too. Every pixel and severity has its own weight."""
    for size, wanted in zip((32, 96), CHANGES[name], strict=True):
        image = (scene(size) * np.array([1, 0.7, 0.4])[:, None, None]).astype(np.uint8)  # tinted
        weights = np.random.default_rng(1).random(image.shape)
        changes = (np.abs(corrupt(image, name, severity, 0).astype(float) - image) for severity in SEVERITIES)
        found = sum(severity * (weights * change).mean() for severity, change in zip(SEVERITIES, changes, strict=True))
        assert found == pytest.approx(wanted, rel=2e-3)


def test_unknown_names_and_severities_are_refused() -> None:
    with pytest.raises(UserError, match=r"'frosty', did you mean 'frost'\?.*gaussian_noise, "):
        corrupt(scene(8), "frosty", 1, 0)
    with pytest.raises(UserError, match=r"severity 6 of 'fog'"):
        corrupt(scene(8), "fog", 6, 0)


@pytest.fixture(scope="module")
def public() -> ModuleType:
    try:
        return importlib.import_module("imagecorruptions.corruptions")
    except ImportError as error:
        pytest.skip(f"no public implementation to compare with: {error} (pip install imagecorruptions-imaug)")


@pytest.mark.parametrize(
    "name", sorted(set(CORRUPTIONS) - {"impulse_noise", "glass_blur", "frost", "elastic_transform"})
)
def test_the_same_numbers_give_the_public_implementation_s_image(public: ModuleType, name: str) -> None:
    size = 360 if name == "snow" else 224  # the package does not trim its enlarged flakes to the image before the blur
    image = np.ascontiguousarray(scene(size).transpose(1, 2, 0))
    function, large, _ = corruptions._TABLE[name]
    allowed = 0 if name.endswith("noise") or name in ("jpeg_compression", "pixelate") else 0.02
    for severity in SEVERITIES:
        np.random.seed(5)
        wanted = np.uint8(getattr(public, name)(Image.fromarray(image), severity)).astype(int)
        levels = function(image, np.random.RandomState(5), *large[severity - 1]).clip(0, 255).astype(np.uint8)
        # Where rounding differs, truncation to integers may give either neighbour.
        assert np.abs(levels - wanted).max() <= 1
        assert np.mean(levels != wanted) <= allowed
