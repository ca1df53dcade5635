"""Image files to pixels."""

import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from coadvise.errors import UserError

Pixels = npt.NDArray[np.uint8]

# What a file may hold, whatever it is called. Pillow knows more; some of it is run, not decoded (EPS by Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
MOST_OBLONG = 32  # of a longer strip only the middle is looked at: scaled up whole it would fill the memory
_BACKGROUND = "white"  # behind what is transparent, as a page shows it; the colour stored there is nobody's choice


class UnreadableImageError(UserError):
    """An image file that cannot be decoded; `str` gives the path and the reason."""


def read_image(path: Path) -> Image.Image:
    """Decodes a file as upright RGB, transparent parts on white, the first frame of an animation.

    Raises:
        UnreadableImageError: the file is missing, no regular file, empty, truncated, not an image of a known format, or
            has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (which is found out before they are decoded).
    """
    try:
        with open_image(path) as image:
            image.load()
            return upright_rgb(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"{str(path)!r}: {reason}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as every network sees it: turned as its EXIF block says, transparent parts on white, of 8 bits."""
    return _rgb(_upright(image))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image whose header alone has been read. Raises whatever Pillow does, and ValueError for too many pixels."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")  # a pipe would be waited for
    with Image.open(path, formats=FORMATS) as image:
        most = Image.MAX_IMAGE_PIXELS  # up to twice this Pillow itself only warns
        if most is not None and image.width * image.height > most:
            raise ValueError(f"decompression bomb: {image.width} x {image.height} pixels, at most {most} are decoded")
        yield image


def readable(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The files that can be decoded, and one line a file that cannot: its path and why."""
    good: list[Path] = []
    faults: list[str] = []
    for path in paths:
        try:
            read_image(path)
            good.append(path)
        except UnreadableImageError as error:
            faults.append(str(error))
    return good, faults


def square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side resized to `size` (bicubic), centre cropped to size x size: what every network is scored on."""
    image = _middle(image)
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


def _middle(image: Image.Image) -> Image.Image:
    width, height = image.size
    most = MOST_OBLONG * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image.crop((left, top, min(width, left + most), min(height, top + most)))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "F"):  # 16 bits and wider: Pillow would clip instead of scaling
        wide = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535.0 if wide.max() > 255 else 255.0
        return Image.fromarray((wide.clip(0, top) * (255.0 / top)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, _BACKGROUND), above).convert("RGB")
    return image.convert("RGB")
