"""Encoded images to pixels."""

import hashlib
import io
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from coadvise.config.schema import Fit, ImageSize, sides, size_text
from coadvise.errors import UserError

Pixels = npt.NDArray[np.uint8]
Values = tuple[float, float]  # of pictures wider than 8 bits: what becomes 0 and what becomes 255
Need = Callable[[int, int], tuple[float, float]]  # from a picture's width and height to those it will be resized to

# Formats that are decoded, whatever a file is called. Pillow knows more; EPS for example starts Ghostscript.
HEIF = find_spec("pillow_heif") is not None  # photographs of many phones; the extra `heic`
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", *(["HEIF"] if HEIF else []))
MOST_BYTES = 2**30  # of an encoded image; more than any with MAX_IMAGE_PIXELS needs
MOST_OBLONG = 32  # longer side over shorter; of a longer strip only the middle is used, since resizing it needs memory
_BACKGROUND = "white"  # behind transparent parts, as web pages show them; the colour stored there is arbitrary
PADDING = (124, 116, 104)  # beside a padded picture: ImageNet's mean, about 0 once normalised, as DeiT fills rotations
WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # Pillow's modes of 16-bit, 32-bit and float pictures

# A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves AMPLE times what it is then resized to.
LARGE = 2_000_000  # pixels; smaller pictures are decoded whole
AMPLE = 2
REDUCED = 1  # raise it with every change of what is decoded at reduced size; logits stored before are then refused


class UnreadableImageError(UserError):
    """A picture that cannot be read or decoded; `str` gives its name and the reason."""


class UnreadNowError(UnreadableImageError):
    """The same where another attempt may succeed: a disk or server that does not answer, too little memory."""


_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # another attempt meets them too


def unreadable(name: str, error: Exception) -> UnreadableImageError:
    """The error of a picture that could not be read or decoded."""
    passing = isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno is not None and not isinstance(error, _LASTING)
    )
    return (UnreadNowError if passing else UnreadableImageError)(fault(name, error))


class DecodedImage(NamedTuple):
    """A decoded picture: `image` is upright RGB, maybe reduced.

    Attributes:
        size: width and height of the whole picture, upright.
        span: the smallest and largest value of a picture of one of the modes `WIDE`; None of any other.
    """

    image: Image.Image
    size: tuple[int, int]
    span: Values | None = None


def read_image(path: Path, need: Need | None = None, values: Values | None = None) -> Image.Image:
    """The image in a file, as `decode` gives it. Raises UnreadableImageError."""
    try:
        content = read_file(path)
    except OSError as error:
        raise unreadable(str(path), error) from None
    return decode(content, str(path), need, values)


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


def decode(content: bytes, name: str, need: Need | None = None, values: Values | None = None) -> Image.Image:
    """The image of `decode_image`."""
    return decode_image(content, name, need, values).image


def decode_image(content: bytes, name: str, need: Need | None = None, values: Values | None = None) -> DecodedImage:
    """An encoded image as upright RGB, transparent parts on white, the first frame of an animation.

    Args:
        name: of the picture, for the error.
        need: what the picture will be resized to; a large JPEG may be decoded at a reduced size then.
        values: what becomes black and white in a picture of one of the modes `WIDE`; None: its own 8 or 16 bits.

    Raises:
        UnreadableImageError: empty, truncated, not an image of a known format, or more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (found before they are decoded).
    """
    try:
        with open_image(content) as image:
            whole = _reduce(image, need) if need is not None and image.width * image.height >= LARGE else None
            image.load()
            upright = upright_rgb(image, values)
            return DecodedImage(upright, whole or upright.size, _span(image))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and others
        raise unreadable(name, error) from None


def _reduce(image: Image.Image, need: Need) -> tuple[int, int] | None:
    """Has a JPEG decoded at a reduced size, if that is ample. Returns its whole size, upright; None of other formats.

    Entropy decoding stays, the rest of the work shrinks with the number of pixels.
    """
    if image.format not in ("JPEG", "MPO"):
        return None
    whole = upright_size(image)
    width, height = (max(1, math.ceil(AMPLE * side)) for side in need(*whole))
    image.draft(None, (width, height) if whole == image.size else (height, width))
    return whole


def _span(image: Image.Image) -> Values | None:
    if image.mode not in WIDE:
        return None
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else None


def fault(name: str, error: Exception) -> str:
    """One printable line: a picture's name as Python writes it, and why it cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # Pillow names the buffer's address
        reason = f"not an image of a known format ({', '.join(FORMATS)})"
    return f"{name!r}: {reason}"


def upright_rgb(image: Image.Image, values: Values | None = None) -> Image.Image:
    """An image as every network sees it: turned as its EXIF block says, transparent parts on white, 8 bits."""
    return _rgb(_upright(image), values)


@contextmanager
def open_image(content: bytes | BinaryIO) -> Iterator[Image.Image]:
    """An image whose header alone is decoded. Raises whatever Pillow does, and ValueError for too many pixels."""
    _teach_pillow_heif()
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
        most = Image.MAX_IMAGE_PIXELS  # up to twice this Pillow itself only warns
        if most is not None and image.width * image.height > most:
            raise ValueError(f"decompression bomb: {image.width} x {image.height} pixels, at most {most} are decoded")
        yield image


def typical_side(readers: Iterable[Callable[[], bytes]]) -> int:
    """The median shorter side, in pixels, of the images that can be read; 0 for none."""
    found = []
    for read in readers:
        with suppress(Exception), open_image(read()) as image:  # whatever is wrong with it, the scan names it
            found.append(min(image.size))
    return int(np.median(found)) if found else 0


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


def fitted(image: Image.Image, size: ImageSize, fit: Fit = "crop") -> Image.Image:
    """An image of that size as networks are scored on it, resized by bicubic interpolation.

    `crop` covers the size and cuts off the ends, `pad` keeps the whole picture on `PADDING`, `stretch` distorts it.
    """
    height, width = sides(size)
    image = _middle(image, height, width) if fit == "crop" else image
    inner = fitted_size(*image.size, size, fit)
    if image.size != inner:
        image = image.resize(inner, Image.Resampling.BICUBIC)
    if fit != "pad":
        left, top = (inner[0] - width) // 2, (inner[1] - height) // 2
        return image.crop((left, top, left + width, top + height))
    ground = Image.new("RGB", (width, height), PADDING)
    ground.paste(image, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return ground


def fitted_size(width: int, height: int, size: ImageSize, fit: Fit) -> tuple[int, int]:
    """Width and height that a picture is resized to before `fitted` crops or pads it."""
    tall, wide = sides(size)
    if fit == "stretch":
        return wide, tall
    if fit == "crop":
        scale = max(wide / width, tall / height)
        return max(wide, round(width * scale)), max(tall, round(height * scale))
    scale = min(wide / width, tall / height)
    return min(wide, max(1, round(width * scale))), min(tall, max(1, round(height * scale)))


def preprocessing_text(size: ImageSize, fit: Fit, values: Values | None = None) -> str:
    """How `decode` and `fitted` make an image, in words."""
    scaled = "" if values is None else "values {:g} to {:g} of more than 8 bits to 0..1, ".format(*values)
    if fit == "stretch":
        return f"{scaled}resize to {size_text(size)} (bicubic)"
    if fit == "pad":
        return f"{scaled}resize to fit into {size_text(size)} (bicubic), centre on RGB {PADDING}"
    if isinstance(size, int):
        return f"{scaled}resize the shorter side to {size} (bicubic), centre crop"
    return f"{scaled}resize to cover {size_text(size)} (bicubic), centre crop"


def to_array(image: Image.Image) -> Pixels:
    """[3, H, W] uint8."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _middle(image: Image.Image, tall: int, wide: int) -> Image.Image:
    """What is used of a picture that is to cover `wide` x `tall` pixels."""
    width, height = image.size
    most_width, most_height = MOST_OBLONG * height * wide // tall, MOST_OBLONG * width * tall // wide
    if width <= most_width and height <= most_height:
        return image
    left, top = max(0, (width - most_width) // 2), max(0, (height - most_height) // 2)
    return image.crop((left, top, min(width, left + most_width), min(height, top + most_height)))


def _upright(image: Image.Image) -> Image.Image:
    """Not by Pillow's `exif_transpose`: it writes the EXIF block anew, and gives up where another tag is odd."""
    image.load()  # some formats say it after the pixels
    turn = _TURNS.get(_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in _TELLING:  # or it would be turned again
        turned.info.pop(key, None)
    return turned


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF or else XMP says; 1 where neither can be read, which says nothing about the pixels."""
    with suppress(Exception):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_TELLING = {"exif", "xmp", "XML:com.adobe.xmp"}  # Pillow decodes a PNG that has none of them to look for more


def _rgb(image: Image.Image, values: Values | None) -> Image.Image:
    if image.mode in WIDE:  # Pillow would clip instead of scaling
        wide = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if values is None:
            top = 65535.0 if wide.max() > 255 else 255.0
            levels = wide.clip(0, top) * (255.0 / top)
        else:
            low, high = values
            levels = np.rint((wide.clip(low, high) - low) * (255.0 / ((high - low) or 1.0)))
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
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
    """Whether a file ends as its format says; False also if only decoding can tell, and where values must be seen."""
    if image.mode in WIDE:
        return False
    if image.format in ("JPEG", "MPO"):
        return end.rstrip(b"\0").endswith(b"\xff\xd9")
    if image.format == "PNG":
        return end.endswith(b"IEND\xae\x42\x60\x82")
    return image.format == "WEBP" and int.from_bytes(begin[4:8], "little") + 8 <= size


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after `upright_rgb`, by the header."""
    sideways = _TELLING & image.info.keys() and _orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if sideways else image.size
