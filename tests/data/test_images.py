"""Whatever lies in the folder is decoded as upright RGB or named, never replaced."""

import os
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from samples import encoded
from tiny import damages

from coadvise.config.schema import Fit
from coadvise.data import images
from coadvise.data.images import (
    AMPLE,
    PADDING,
    UnreadableImageError,
    decode,
    decode_image,
    fitted,
    fitted_size,
    read_image,
    to_array,
)

COLOURS = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_come_back_as_they_were(tmp_path: Path, form: str) -> None:
    (tmp_path / "x").write_bytes(encoded(Image.fromarray(COLOURS), form))
    assert np.array_equal(pixels(tmp_path / "x"), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_turned_photographs_are_put_upright(tmp_path: Path, orientation: int, form: str) -> None:
    # What the EXIF tag says was done to the upright image, undone by hand (TIFF 6.0, tag 274).
    undo = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    (tmp_path / "x").write_bytes(encoded(Image.fromarray(COLOURS), form, exif=exif))
    assert np.array_equal(pixels(tmp_path / "x"), undo[orientation](COLOURS))


@pytest.mark.parametrize("odd", [(282, "72"), (271, 2.5), (296, "inch")])  # a resolution, a maker and a unit
def test_an_odd_tag_does_not_keep_a_photograph_sideways(tmp_path: Path, odd: tuple[int, object]) -> None:
    exif = Image.Exif()
    exif[274] = 6
    content = bytearray(exif.tobytes())
    (tmp_path / "x").write_bytes(encoded(Image.fromarray(COLOURS), "JPEG", exif=_with_tag(bytes(content), *odd)))
    assert pixels(tmp_path / "x").shape == (5, 7, 3)


def _with_tag(exif: bytes, tag: int, value: object) -> bytes:
    """An EXIF block of one tag with a second one, of another type than its own."""
    text = f"{value}\0".encode()[:4].ljust(4, b"\0")
    assert exif.startswith(b"Exif\0\0MM\0*\0\0\0\x08\0\x01")
    first = exif[16:28]
    entries = sorted([first, tag.to_bytes(2, "big") + (2).to_bytes(2, "big") + (4).to_bytes(4, "big") + text])
    return exif[:14] + b"\0\x02" + b"".join(entries) + b"\0\0\0\0"


def test_a_16_bit_image_is_turned_and_scaled(tmp_path: Path) -> None:
    wide = (COLOURS[..., 0].astype(np.uint16) * 257) | 0x00FF
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "x").write_bytes(encoded(Image.fromarray(wide), "PNG", exif=exif))
    expected = np.rot90((wide / 257).astype(np.uint8), -1)
    assert np.array_equal(pixels(tmp_path / "x"), np.stack([expected] * 3, -1))


def test_a_broken_exif_block_does_not_cost_the_image(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encoded(Image.fromarray(COLOURS), "JPEG", exif=b"Exif\0\0nonsense, not a TIFF"))
    assert pixels(tmp_path / "x").shape == COLOURS.shape


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.full((4, 4), 255, np.uint8))
    grey = Image.fromarray(np.full((4, 4), 65535, np.uint16)) if mode == "I;16" else grey.convert(mode)
    form = "TIFF" if mode in ("CMYK", "YCbCr", "F", "I") else "PNG"
    if mode == "YCbCr" and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read back what it writes")
    (tmp_path / "x").write_bytes(encoded(grey, form))
    assert (pixels(tmp_path / "x") == 255).all()


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    (tmp_path / "x").write_bytes(encoded(red.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels(tmp_path / "x").astype(int) - (200, 30, 40)).max() <= 4


def test_what_is_transparent_is_shown_on_white(tmp_path: Path) -> None:
    """Whatever colour lies hidden there, and however the file says that it is transparent."""
    rng = np.random.default_rng(1)
    colours, alpha = rng.integers(0, 256, (6, 5, 3)), rng.choice([0, 128, 255], (6, 5, 1))
    expected = (colours * alpha + 255 * (255 - alpha)) / 255
    rgba = Image.fromarray(np.concatenate([colours, alpha], 2).astype(np.uint8))
    for form, options in {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}.items():
        (tmp_path / "x").write_bytes(encoded(rgba, form, **options))
        assert np.abs(pixels(tmp_path / "x") - expected).max() <= 1
    key = Image.new("RGB", (4, 4), (1, 2, 3))
    key.putpixel((1, 1), (9, 9, 9))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 1, 2, 3])
    palette.putpixel((1, 1), 0)
    grey = Image.new("L", (4, 4), 7)
    grey.putpixel((1, 1), 9)
    cases = [(key, "PNG", (9, 9, 9)), (palette, "PNG", 0), (palette, "GIF", 0), (grey, "PNG", 9)]
    for image, form, transparent in cases:
        (tmp_path / "x").write_bytes(encoded(image, form, transparency=transparent))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = pixels(tmp_path / "x")
        assert found[1, 1].tolist() == [255, 255, 255]
        assert found[0, 0].tolist() == ([7, 7, 7] if image is grey else [1, 2, 3])


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, form: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    (tmp_path / "x").write_bytes(encoded(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert Image.open(tmp_path / "x").n_frames == 3
    assert (pixels(tmp_path / "x") == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (40, 3), (16, 16)])
def test_any_shape_is_made_square(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "x.png")
    array = to_array(fitted(read_image(tmp_path / "x.png"), 16))
    assert array.shape == (3, 16, 16)
    assert (array == np.array([9, 8, 7])[:, None, None]).all()


@pytest.mark.parametrize("size", [(60_000, 3), (2, 60_000)])
def test_a_strip_is_not_scaled_up_whole(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled until its shorter side has 64 pixels, such a strip would have 4 to 6 thousand million bytes."""
    strip = Image.new("RGB", size, "white")
    strip.paste("red", tuple(side // 2 - 30 for side in size) + tuple(side // 2 + 30 for side in size))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    array = to_array(fitted(strip, 64))
    assert (array == np.array([255, 0, 0])[:, None, None]).all()


def before(image: Image.Image, size: int) -> Image.Image:
    """What scored images were before there were other shapes: the shorter side resized, the centre cropped."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


picture_sizes = st.tuples(st.integers(1, 60), st.integers(1, 60))


@given(picture_sizes, st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**31))
def test_a_picture_is_fitted_as_its_way_says(whole: tuple[int, int], height: int, width: int, seed: int) -> None:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*whole[::-1], 3), dtype=np.uint8))
    if max(whole) <= 32 * min(whole):
        assert fitted(image, width).tobytes() == before(image, width).tobytes()
    for fit in ("crop", "pad", "stretch"):
        assert fitted(image, (height, width), fit).size == (width, height)
    stretched = image.resize((width, height), Image.Resampling.BICUBIC)
    assert fitted(image, (height, width), "stretch").tobytes() == stretched.tobytes()
    inner = fitted_size(*whole, (height, width), "pad")
    assert inner[0] == width or inner[1] == height
    assert abs(inner[0] - inner[1] * whole[0] / whole[1]) <= max(1, whole[0] / whole[1])
    padded = np.array(fitted(image, (height, width), "pad"))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    box = padded[top : top + inner[1], left : left + inner[0]]
    assert np.array_equal(box, np.asarray(image.resize(inner, Image.Resampling.BICUBIC)))
    box[:] = PADDING
    assert (padded == PADDING).all()


def test_a_strip_covers_a_strip_with_all_of_it() -> None:
    """Only what is longer still than the size asked for is cut before it is resized."""
    ramp = np.arange(1024, dtype=np.uint16)[None, :, None].repeat(8, 0).repeat(3, 2)
    image = Image.fromarray((ramp // 4).astype(np.uint8))
    assert fitted(image, (8, 1024)).tobytes() == image.tobytes()


# more than 8 bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_values_become_levels_by_the_range_of_the_set(form: str, kind: type) -> None:
    if form == "PNG" and kind is not np.uint16:
        pytest.skip("PNG files have no such values")
    wide = np.arange(0, 4096, 15).reshape(2, -1).astype(kind)
    wide = wide / 4095 if kind is np.float32 else wide
    content = encoded(Image.fromarray(wide.astype(kind)), form)
    span = decode_image(content, "").span
    assert span == pytest.approx((0, 1 if kind is np.float32 else 4095))
    levels = np.asarray(decode(content, "", values=span))
    assert np.array_equal(levels[..., 0], np.rint(np.arange(0, 4096, 15).reshape(2, -1) * 255 / 4095))
    assert np.asarray(decode(content, "")).max() == (1 if kind is np.float32 else 15), "by itself it is black"
    other = np.asarray(decode(content, "", values=(span[1] / 4, span[1] / 2)))  # of a set that it is no part of
    assert (other.min(), other.max()) == (0, 255)


def test_what_is_no_number_does_not_count_and_one_value_is_a_range_too() -> None:
    wide = np.array([[0.5, np.nan, np.inf, -np.inf]], np.float32)
    assert decode_image(encoded(Image.fromarray(wide), "TIFF"), "").span == (0.5, 0.5)
    assert decode_image(encoded(Image.fromarray(np.full((1, 4), np.nan, np.float32)), "TIFF"), "").span is None
    assert decode_image(encoded(Image.fromarray(COLOURS), "PNG"), "").span is None
    levels = np.asarray(decode(encoded(Image.fromarray(wide), "TIFF"), "", values=(0.5, 0.5)))
    assert levels[0, :, 0].tolist() == [0, 0, 0, 0]


# large pictures ------------------------------------------------------------------------------------------------------


def photograph(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 14, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray((np.asarray(coarse) + rng.normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("tag", ["exif", "xmp"])
def test_a_large_jpeg_is_decoded_at_a_reduced_size_that_is_ample(
    tag: str, orientation: int, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LARGE", 304 * 200)
    exif = Image.Exif()
    exif[274] = orientation
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    by_xmp = {"xmp": xmp, "exif": b""} if tag == "xmp" else {"exif": exif}
    content = encoded(photograph(304, 200), "JPEG", quality=92, **by_xmp)
    size = (16, 24)
    need = partial(fitted_size, size=size, fit=fit)
    whole, reduced = decode_image(content, ""), decode_image(content, "", need)
    assert reduced.size == whole.size == whole.image.size == ((304, 200) if orientation < 5 else (200, 304))
    assert reduced.image.width <= whole.image.width // 2
    assert all(side >= AMPLE * least for side, least in zip(reduced.image.size, need(*whole.size), strict=True))
    one, other = (np.asarray(fitted(seen.image, size, fit), float) for seen in (whole, reduced))
    assert np.abs(one - other).mean() < 1.0
    enlarged = decode_image(content, "", lambda width, height: (4 * width, 4 * height))
    assert enlarged.image.tobytes() == whole.image.tobytes()


def test_smaller_pictures_and_other_formats_are_decoded_whole() -> None:
    tiny = partial(fitted_size, size=8, fit="crop")
    for image, form in ((photograph(1280, 960), "JPEG"), (Image.new("L", (1700, 1300), 9), "PNG")):
        content = encoded(image, form)
        assert decode(content, "", tiny).tobytes() == decode(content, "").tobytes()


BAD = {
    "empty": b"",
    "page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "truncated": encoded(Image.new("RGB", (64, 64)), "JPEG")[:-100],
    "chunk": encoded(Image.fromarray(COLOURS), "PNG")[:-30],
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_decoded_is_named(tmp_path: Path, fault: str) -> None:
    path = tmp_path / f"{fault}.jpg"
    path.write_bytes(BAD[fault])
    with pytest.raises(UnreadableImageError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    for path in (tmp_path / "missing.png", tmp_path, *sorted(tmp_path.iterdir())):
        with pytest.raises(UnreadableImageError, match=path.name):
            read_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [100_000, 200_000])  # above twice the limit Pillow raises, up to it it only warns
def test_a_decompression_bomb_is_named_and_never_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.new("1", (500, 500)), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UnreadableImageError, match=r"bomb\.png.*decompression bomb"):
        read_image(path)


def test_a_program_is_not_run_to_decode_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has PostScript drawn by Ghostscript, whatever the file's name."""
    path = tmp_path / "photograph.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(UnreadableImageError, match="not an image"):
        read_image(path)


@settings(max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), damages())
def test_a_damaged_file_is_decoded_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "x"
    options = {"compression": "tiff_lzw"} if form == "TIFF" else {}
    path.write_bytes(damage(encoded(Image.fromarray(COLOURS), form, **options)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mode = read_image(path).mode
        except UnreadableImageError:
            return
    assert mode == "RGB"
