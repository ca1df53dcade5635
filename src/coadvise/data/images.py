"""Encoded images to pixels."""

import hashlib
import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from coadvise.errors import UserError

Pixels = npt.NDArray[np.uint8]

# Formats that are decoded, whatever a file is called. Pillow knows more; EPS for example starts Ghostscript.
HEIF = find_spec("pillow_heif") is not None  # photographs of many phones; the extra `heic`
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", *(["HEIF"] if HEIF else []))
MOST_BYTES = 2**30  # of an encoded image; more than any with MAX_IMAGE_PIXELS needs
MOST_OBLONG = 32  # longer side over shorter; of a longer strip only the middle is used, since resizing it needs memory
_BACKGROUND = "white"  # behind transparent parts, as web pages show them; the colour stored there is arbitrary


class UnreadableImageError(UserError):
    """A picture that cannot be read or decoded; `str` gives its name and the reason."""


def read_image(path: Path) -> Image.Image:
    """The image in a file, as `decode` gives it. Raises UnreadableImageError."""
    try:
        content = read_file(path)
    except OSError as error:
        raise UnreadableImageError(fault(str(path), error)) from None
    return decode(content, str(path))


def read_file(path: Path) -> bytes:
    """A regular file's bytes. Raises OSError, also for what is no regular file or larger than any image."""
    with open_file(path) as file:
        return file.read()


def open_file(path: Path | bytes) -> BinaryIO:
    """A regular file, not buffered. Raises OSError, also for what is no regular file or larger than any image."""
    file = cast(BinaryIO, open(path, "rb", buffering=0, opener=_open_now))  # noqa: SIM115
    about = os.fstat(file.fileno())
    fault = "not a regular file" if not stat.S_ISREG(about.st_mode) else ""
    if about.st_size > MOST_BYTES:
        fault = f"{about.st_size} bytes, and at most {MOST_BYTES} are read"
    if fault:
        file.close()
        raise OSError(fault)
    return file


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe would wait


def decode(content: bytes, name: str) -> Image.Image:
    """An encoded image as upright RGB, transparent parts on white, the first frame of an animation.

    Args:
        name: of the picture, for the error.

    Raises:
        UnreadableImageError: empty, truncated, not an image of a known format, or more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (found before they are decoded).
    """
    try:
        with open_image(content) as image:
            image.load()
            return upright_rgb(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and others
        raise UnreadableImageError(fault(name, error)) from None


def fault(name: str, error: Exception) -> str:
    """One printable line: a picture's name as Python writes it, and why it cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # Pillow names the buffer's address
        reason = f"not an image of a known format ({', '.join(FORMATS)})"
    return f"{name!r}: {reason}"


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as every network sees it: turned as its EXIF block says, transparent parts on white, 8 bits."""
    return _rgb(_upright(image))


@contextmanager
def open_image(content: bytes | BinaryIO) -> Iterator[Image.Image]:
    """An image whose header alone is decoded. Raises whatever Pillow does, and ValueError for too many pixels."""
    _teach_pillow_heif()
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
        most = Image.MAX_IMAGE_PIXELS  # up to twice this Pillow itself only warns
        if most is not None and image.width * image.height > most:
            raise ValueError(f"decompression bomb: {image.width} x {image.height} pixels, at most {most} are decoded")
        yield image


@cache
def _teach_pillow_heif() -> None:
    if HEIF:
        from pillow_heif import register_heif_opener  # not at the top: commands that open no image start faster

        register_heif_opener()


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
    """Resizes the shorter side to `size` (bicubic) and crops the centre, size x size: what networks are scored on."""
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


ENDS = 2**15  # bytes at the beginning and at the end of a large file that tell files apart


def digest_of(begin: bytes, end: bytes, size: int) -> int:
    """The first 64 bits of the sha256 of a picture's bytes; of a file over 2 · ENDS, of its two ends and its size.

    Args:
        begin: at least the first 2 · ENDS bytes, or all.
        end: at least the last ENDS bytes, if it is larger than that.
    """
    told = begin if size <= 2 * ENDS else begin[:ENDS] + end[-ENDS:] + size.to_bytes(8, "little")
    return first_bits(told)


def first_bits(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def is_whole(image: Image.Image, begin: bytes, end: bytes, size: int) -> bool:
    """Whether a file ends as its format says; False also if only decoding can tell."""
    if image.format in ("JPEG", "MPO"):
        return end.rstrip(b"\0").endswith(b"\xff\xd9")
    if image.format == "PNG":
        return end.endswith(b"IEND\xae\x42\x60\x82")
    return image.format == "WEBP" and int.from_bytes(begin[4:8], "little") + 8 <= size


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after `upright_rgb`, by the header."""
    if "exif" in image.info:
        with suppress(Exception):  # a broken EXIF block says nothing about the pixels
            if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
                return image.height, image.width
    return image.size
