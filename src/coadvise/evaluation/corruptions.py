"""The fifteen corruptions of ImageNet-C at five severities, as pure functions of (image, name, severity, seed).

Formulas and constants are those of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (ICLR 2019), and of the code they published with it; images of less than 96 pixels get
the constants they published for CIFAR-10-C (32 pixels). Pixel values are truncated, not rounded, as there.

Three differences. Their frost overlays one of five photographs; ours is a random texture with the brightness, contrast
and power spectrum of these photographs. Their motion blur is ImageMagick's; ours is the same sum of shifted images in
floating point. Random numbers come from the seed alone, and ImageNet-C is stored as JPEG, so the images are not equal
to those of ImageNet-C: use its files to compare with published numbers.
"""

import io
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import correlate1d, gaussian_filter, map_coordinates, zoom
from scipy.signal import fftconvolve

from coadvise.config.reading import nearest
from coadvise.data.images import Pixels
from coadvise.errors import UserError

Floats = npt.NDArray[np.floating[Any]]
Generator = np.random.Generator

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 96  # pixels; smaller images get the constants of CIFAR-10-C


def corrupt(image: Pixels, name: str, severity: int, seed: int) -> Pixels:
    """A corrupted copy of an image.

    Args:
        image: [3, H, W] uint8.
        name: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: decides all random numbers; each name and severity has its own.

    Raises:
        UserError: an unknown corruption or severity.
    """
    if name not in _TABLE:
        raise UserError(f"unknown corruption '{name}'{nearest(name, CORRUPTIONS)}; allowed: {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity} of '{name}' must be 1, 2, 3, 4 or 5")
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert len(image) == 3
    function, large, small = _TABLE[name]
    constants = (small if min(image.shape[1:]) < SMALL else large)[severity - 1]
    rng = np.random.default_rng((seed, zlib.crc32(name.encode()), severity))
    levels = function(np.ascontiguousarray(image.transpose(1, 2, 0)), rng, *constants)
    return np.ascontiguousarray(levels.clip(0, 255).astype(np.uint8).transpose(2, 0, 1))


# Each function takes an image [H, W, 3] uint8, a generator and its constants, and returns levels [H, W, 3]; `corrupt`
# clips these to 0..255 and truncates them to integers.


def _gaussian_noise(image: Pixels, rng: Generator, scale: float) -> Floats:
    return (image / 255.0 + rng.normal(size=image.shape, scale=scale)) * 255


def _shot_noise(image: Pixels, rng: Generator, photons: float) -> Floats:
    return rng.poisson(image / 255.0 * photons) / photons * 255


def _impulse_noise(image: Pixels, rng: Generator, amount: float) -> Pixels:
    """Single channel values, not whole pixels, become 0 or 255."""
    flipped, salted = rng.random(image.shape) <= amount, rng.random(image.shape) <= 0.5
    return np.where(flipped, np.where(salted, np.uint8(255), np.uint8(0)), image)


def _defocus_blur(image: Pixels, rng: Generator, radius: float, alias_blur: float) -> Floats:
    kernel = _disk(radius, alias_blur)
    reach = kernel.shape[0] // 2
    padded = np.pad(image / 255.0, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    return fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1)) * 255


def _disk(radius: float, alias_blur: float) -> Floats:
    """A disk with sum 1, its edge smoothed by a Gaussian of 3 taps (large disks: 5)."""
    reach, taps = (8, 3) if radius <= 8 else (int(radius), 5)
    offsets = np.arange(-reach, reach + 1)
    disk = (np.add.outer(offsets**2, offsets**2) <= radius**2).astype(np.float64)
    disk /= disk.sum()
    weights = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * alias_blur**2))
    for axis in (0, 1):
        disk = correlate1d(disk, weights / weights.sum(), axis, mode="mirror")
    return disk


def _glass_blur(image: Pixels, rng: Generator, sigma: float, reach: int, rounds: int) -> Floats:
    """Blur, shuffle, blur. The published swap of two pixels copies one over the other; so does this one."""
    height, width = image.shape[:2]
    soft = (_gaussian(image / 255.0, sigma) * 255).astype(np.uint8)
    rows, columns = np.meshgrid(*(np.arange(size - reach, reach, -1) for size in (height, width)), indexing="ij")
    comes_from = list(range(height * width))
    for _ in range(rounds):
        right, down = np.moveaxis(rng.integers(-reach, reach, size=(*rows.shape, 2)), -1, 0)
        here, there = rows * width + columns, (rows + down) * width + columns + right
        for a, b in zip(
            here.ravel().tolist(), there.ravel().tolist(), strict=True
        ):  # in order: a copy may be copied again
            comes_from[a] = comes_from[b]
    shuffled = soft.reshape(-1, 3)[comes_from].reshape(image.shape)
    return _gaussian(shuffled / 255.0, sigma) * 255


def _gaussian(x: Floats, sigma: float) -> Floats:
    return gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4.0)


def _motion_blur(image: Pixels, rng: Generator, radius: int, sigma: float) -> Floats:
    return _streak(image.astype(np.float64), radius, sigma, rng.uniform(-45, 45))


def _streak(x: Floats, radius: int, sigma: float, angle: float) -> Floats:
    """The mean of copies of x shifted further and further in one direction (degrees), weighted by half a Gaussian."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    downs = -np.ceil(steps * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
    rights = -np.ceil(steps * np.cos(np.deg2rad(angle)) - 0.5).astype(int)
    height, width = x.shape[:2]
    reach = 2 * radius + 1
    padded = np.pad(x, ((reach, reach), (reach, reach), *[(0, 0)] * (x.ndim - 2)), "edge")
    out = np.zeros_like(x)
    for weight, down, right in zip(weights, downs, rights, strict=True):
        if abs(down) >= height or abs(right) >= width:  # outside the image
            break
        out += weight * padded[reach - down : reach - down + height, reach - right : reach - right + width]
    return out


def _zoom_blur(image: Pixels, rng: Generator, stop: float, step: float) -> Floats:
    x = image.transpose(2, 0, 1) / 255.0
    factors = np.arange(1, stop, step)
    total = x + sum(_zoomed(x, factor) for factor in factors)
    return total.transpose(1, 2, 0) / (len(factors) + 1) * 255


def _zoomed(x: Floats, factor: float) -> Floats:
    """The centre of x [..., H, W], enlarged to the size of x by linear interpolation."""
    inner = [int(np.ceil(size / factor)) for size in x.shape[-2:]]
    top, left = ((size - part) // 2 for size, part in zip(x.shape[-2:], inner, strict=True))
    along, across = (_zooming(size, part, factor) for size, part in zip(x.shape[-2:], inner, strict=True))
    return along @ x[..., top : top + inner[0], left : left + inner[1]] @ across.T


@lru_cache(64)
def _zooming(size: int, inner: int, factor: float) -> Floats:
    """The matrix [size, inner] that enlarges along one axis; the map is separable, so two products apply it."""
    large = zoom(np.eye(inner), (factor, 1), order=1)
    trim = (len(large) - size) // 2
    return large[trim : trim + size]


def _snow(
    image: Pixels,
    rng: Generator,
    mean: float,
    spread: float,
    flake: float,
    threshold: float,
    radius: int,
    sigma: float,
    keep: float,
) -> Floats:
    """Flakes with motion blur over a whitened image."""
    layer = _zoomed(rng.normal(size=image.shape[:2], loc=mean, scale=spread), flake)
    layer = np.where(layer < threshold, 0, layer).clip(0, 1)
    layer = (np.round(_streak(layer, radius, sigma, rng.uniform(-135, -45)) * 255) / 255)[..., None]
    x = image / 255.0
    gray = x @ np.array([0.299, 0.587, 0.114])
    x = keep * x + (1 - keep) * np.maximum(x, gray[..., None] * 1.5 + 0.5)
    return (x + layer + np.rot90(layer, 2)) * 255


def _frost(image: Pixels, rng: Generator, keep: float, strength: float) -> Floats:
    contrast = (
        0.7 if min(image.shape[:2]) < SMALL else 1.0
    )  # CIFAR-10-C scales the photographs down, which lowers their contrast
    return keep * image.astype(np.float64) + strength * _frost_texture(image.shape[0], image.shape[1], rng, contrast)


def _frost_texture(height: int, width: int, rng: Generator, contrast: float) -> Floats:
    """Levels [H, W, 3] of a bluish pattern: soft patches, and bright ridges along the zeros of a second pattern.

    Both patterns are Gaussian with power proportional to frequency^-1.7. The mean (85..205), the standard deviation
    (15..38) and the difference of red to green are uniform in the range of the photographs' crops.
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no constant term
    patches, ridges = (
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * frequency**-0.85, (height, width))
        for _ in range(2)
    )
    texture = patches / patches.std() - np.abs(ridges) / ridges.std()
    texture = (texture - texture.mean()) / texture.std()
    levels = rng.uniform(85, 205) + contrast * rng.uniform(15, 38) * texture
    return (levels[..., None] + np.array([-rng.uniform(5, 55), 3.0, 14.0])).clip(0, 255)


def _fog(image: Pixels, rng: Generator, strength: float, decay: float) -> Floats:
    height, width = image.shape[:2]
    x = image / 255.0
    brightest = x.max()
    fog = strength * _plasma(1 << (max(height, width) - 1).bit_length(), decay, rng)[:height, :width, None]
    return (x + fog) * brightest / (brightest + strength) * 255


def _plasma(size: int, decay: float, rng: Generator) -> Floats:
    """A height map [size, size] in 0..1 by the diamond-square algorithm; `size` is a power of two."""
    heights = np.zeros((size, size))
    step, wobble = size, 100.0

    def middle(total: Floats) -> Floats:
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        below = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = middle(below + np.roll(below, -1, axis=1))
        centres = heights[half::step, half::step]
        heights[::step, half::step] = middle(
            centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        )
        heights[half::step, ::step] = middle(
            centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        )
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights / heights.max()


def _brightness(image: Pixels, rng: Generator, more: float) -> Floats:
    """Raises the value of HSV at the same hue and saturation: all channels keep their ratio to the largest."""
    x = image / 255.0
    value = x.max(axis=2, keepdims=True)
    raised = (value + more).clip(0, 1)
    saturations = np.divide(value - x, value, out=np.zeros_like(x), where=value > 0)
    return raised * (1 - saturations) * 255


def _contrast(image: Pixels, rng: Generator, keep: float) -> Floats:
    x = image / 255.0
    means = x.mean(axis=(0, 1), keepdims=True)
    return ((x - means) * keep + means) * 255


def _elastic_transform(image: Pixels, rng: Generator, alpha: float, sigma: float, affine: float) -> Floats:
    """A random affine map, then displacements of `alpha` times noise blurred by `sigma`.

    All are shares of the shorter side.
    """
    height, width = image.shape[:2]
    size = min(height, width)
    x = (image / 255.0).astype(np.float32)
    right, down, arm = float(width // 2), float(height // 2), size // 3
    corners = np.array([[right + arm, down + arm], [right + arm, down - arm], [right - arm, down - arm]])
    moved = corners + rng.uniform(-affine * size, affine * size, size=(3, 2))
    # Where each output pixel comes from: the affine map (in x, y) that takes the moved corners back.
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # [3, 2]
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    from_columns, from_rows = (columns * back[0, i] + rows * back[1, i] + back[2, i] for i in range(2))
    x = _sampled(x, from_rows, from_columns, "mirror")
    along, across = _blurring(height, sigma * size), _blurring(width, sigma * size)
    aside, below = (along @ rng.uniform(-1, 1, size=(height, width)) @ across.T * alpha * size for _ in range(2))
    return _sampled(x, rows + below, columns + aside, "reflect") * 255


@lru_cache(64)
def _blurring(size: int, sigma: float) -> Floats:
    """The matrix [size, size] that blurs along one axis; filtering would be slow for a sigma close to the size."""
    return gaussian_filter(np.eye(size), (sigma, 0), mode="reflect", truncate=3)


def _sampled(x: Floats, rows: Floats, columns: Floats, mode: str) -> Floats:
    places = np.stack([rows, columns])
    return np.stack([map_coordinates(x[..., c], places, order=1, mode=mode) for c in range(3)], axis=-1)


def _pixelate(image: Pixels, rng: Generator, scale: float) -> Pixels:
    whole = Image.fromarray(image)
    small = whole.resize((int(whole.width * scale), int(whole.height * scale)), Image.Resampling.BOX)
    return np.asarray(small.resize(whole.size, Image.Resampling.BOX))


def _jpeg_compression(image: Pixels, rng: Generator, quality: int) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _each(*constants: float) -> tuple[tuple[float, ...], ...]:
    """Constants of a function with one constant, by severity."""
    return tuple((value,) for value in constants)


_ELASTIC = 244 / 224  # "244 should have been 224, but ultimately nothing is incorrect", say the authors

# name: function, constants by severity for large images (ImageNet-C) and for small ones (CIFAR-10-C)
_TABLE: Mapping[str, tuple[Callable[..., Any], tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]]
_TABLE = MappingProxyType(
    {
        "gaussian_noise": (_gaussian_noise, _each(0.08, 0.12, 0.18, 0.26, 0.38), _each(0.04, 0.06, 0.08, 0.09, 0.10)),
        "shot_noise": (_shot_noise, _each(60, 25, 12, 5, 3), _each(500, 250, 100, 75, 50)),
        "impulse_noise": (_impulse_noise, _each(0.03, 0.06, 0.09, 0.17, 0.27), _each(0.01, 0.02, 0.03, 0.05, 0.07)),
        "defocus_blur": (
            _defocus_blur,
            ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
            ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ),
        "glass_blur": (
            _glass_blur,
            ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
            ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ),
        "motion_blur": (
            _motion_blur,
            ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
            ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ),
        "zoom_blur": (
            _zoom_blur,
            ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
            ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ),
        "snow": (
            _snow,
            (
                (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ),
            (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ),
        ),
        "frost": (
            _frost,
            ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
            ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ),
        "fog": (
            _fog,
            ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ),
        "brightness": (_brightness, _each(0.1, 0.2, 0.3, 0.4, 0.5), _each(0.05, 0.1, 0.15, 0.2, 0.3)),
        "contrast": (_contrast, _each(0.4, 0.3, 0.2, 0.1, 0.05), _each(0.75, 0.5, 0.4, 0.3, 0.15)),
        "elastic_transform": (
            _elastic_transform,
            (
                (2 * _ELASTIC, 0.7 * _ELASTIC, 0.1 * _ELASTIC),
                (2 * _ELASTIC, 0.08 * _ELASTIC, 0.2 * _ELASTIC),
                (0.05 * _ELASTIC, 0.01 * _ELASTIC, 0.02 * _ELASTIC),
                (0.07 * _ELASTIC, 0.01 * _ELASTIC, 0.02 * _ELASTIC),
                (0.12 * _ELASTIC, 0.01 * _ELASTIC, 0.02 * _ELASTIC),
            ),
            ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ),
        "pixelate": (_pixelate, _each(0.6, 0.5, 0.4, 0.3, 0.25), _each(0.95, 0.9, 0.85, 0.75, 0.65)),
        "jpeg_compression": (_jpeg_compression, _each(25, 18, 15, 10, 7), _each(80, 65, 58, 50, 40)),
    }
)

CORRUPTIONS = tuple(_TABLE)  # in the order of the paper's tables
