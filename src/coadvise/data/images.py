"""Image files to pixels."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from coadvise.errors import UserError

Pixels = npt.NDArray[np.uint8]


class UnreadableImageError(UserError):
    """An image file that cannot be decoded; `str` gives the path and the reason."""


def read_image(path: Path) -> Image.Image:
    """Decodes a file as upright RGB.

    Raises:
        UnreadableImageError: the file is missing, empty, truncated, not an image or a decompression bomb.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _rgb(_upright(image))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"{str(path)!r}: {reason}") from None


def square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side resized to `size` (bicubic), centre cropped to size x size: what every network is scored on."""
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image) -> Pixels:
    """[3, H, W] uint8."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "F"):  # 16 bits and wider: Pillow would clip instead of scaling
        wide = np.asarray(image, dtype=np.float64)
        top = 65535.0 if wide.max() > 255 else 255.0
        return Image.fromarray((wide.clip(0, top) * (255.0 / top)).astype(np.uint8)).convert("RGB")
    return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
