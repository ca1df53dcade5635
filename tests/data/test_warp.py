"""Maps of an image's plane are Pillow's to the bit, by the native kernel and without it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.auto_augment import rotate, shear_x, shear_y, translate_x_rel, translate_y_abs

from coadvise.data import warp
from coadvise.data.warp import Warped
from coadvise.ops import native

AFFINE, BICUBIC = Image.Transform.AFFINE, Image.Resampling.BICUBIC
needs_kernel = pytest.mark.skipif(warp._kernel() is None, reason="no native kernel: no compiler, or switched off")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_pillows(image: Image.Image, *args: Any, **about: Any) -> None:
    wanted = image.transform(*args, **about)
    got = Warped(image).transform(*args, **about)
    assert got.mode == wanted.mode
    assert got.size == wanted.size
    assert np.array_equal(np.array(got), np.array(wanted))


@needs_kernel
@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    seed=st.integers(0, 99),
    matrix=st.tuples(*[st.floats(-3, 3), st.floats(-3, 3), st.floats(-50, 50)] * 2),
    fill=st.sampled_from([None, (0, 0, 0), (124, 116, 104), (255, 1, 7)]),
)
def test_any_map_is_pillows(
    width: int, height: int, seed: int, matrix: tuple[float, ...], fill: tuple[int, int, int] | None
) -> None:
    image = photograph(width, height, seed)
    assert_pillows(image, image.size, AFFINE, matrix, resample=BICUBIC, fillcolor=fill)


@needs_kernel
@given(size=st.tuples(st.integers(1, 60), st.integers(1, 60)), level=st.floats(-1, 1), seed=st.integers(0, 99))
def test_timms_moves_are_pillows(size: tuple[int, int], level: float, seed: int) -> None:
    image = photograph(*size, seed)
    moves = (
        (rotate, 90 * level),
        (shear_x, level),
        (shear_y, level),
        (translate_x_rel, level),
        (translate_y_abs, 9 * level),
    )
    for move, amount in moves:
        about = {"fillcolor": (124, 116, 104), "resample": BICUBIC}
        wanted, got = move(image, amount, **about), move(Warped(image), amount, **about)
        assert np.array_equal(np.array(got), np.array(wanted)), move


@needs_kernel
def test_the_kernel_is_taken_where_it_is_pillows_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = warp._kernel()
    assert kernel is not None
    monkeypatch.setattr(warp, "_kernel", lambda: lambda *args: calls.append(1) or kernel(*args))
    image = photograph(30, 20)
    matrix = (1.1, 0.2, -3.0, 0.1, 0.9, 2.0)
    assert_pillows(image, image.size, AFFINE, matrix, resample=BICUBIC)
    assert len(calls) == 1
    others: list[tuple[Image.Image, tuple[Any, ...], dict[str, Any]]] = [
        (image, ((9, 8), AFFINE, matrix), {"resample": BICUBIC}),
        (image, (image.size, AFFINE, matrix), {"resample": Image.Resampling.BILINEAR}),
        (image, (image.size, AFFINE, matrix), {"resample": BICUBIC, "fillcolor": "red"}),
        (image, (image.size, AFFINE, matrix), {"resample": BICUBIC, "fill": 0, "fillcolor": (1, 2, 3)}),
        (image, (image.size, Image.Transform.EXTENT, (2, 3, 20, 15)), {"resample": BICUBIC}),
        (image.convert("L"), (image.size, AFFINE, matrix), {"resample": BICUBIC, "fillcolor": 7}),
        (image.convert("RGBA"), (image.size, AFFINE, matrix), {"resample": BICUBIC, "fillcolor": (1, 2, 3, 4)}),
    ]
    for other, args, about in others:
        assert_pillows(other, *args, **about)
    assert len(calls) == 1


@needs_kernel
def test_an_image_that_memory_has_no_place_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = warp._kernel()
    assert kernel is not None
    monkeypatch.setattr(warp, "_kernel", lambda: lambda image, height, *rest: kernel(image, 2**47, *rest))
    with pytest.raises(MemoryError, match="no memory to move an image of 30x20 pixels"):
        rotate(Warped(photograph(30, 20)), 13.0, resample=BICUBIC)


def test_without_the_kernel_pillow_makes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(33, 21)
    fast = rotate(Warped(image), 13.0, fillcolor=(1, 2, 3))
    monkeypatch.setattr(warp, "_kernel", lambda: None)
    assert np.array_equal(np.array(rotate(Warped(image), 13.0, fillcolor=(1, 2, 3))), np.array(fast))


@pytest.mark.usefixtures("fresh_kernel")
def test_without_a_compiler_pillow_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    image = photograph(8, 8)
    with pytest.warns(RuntimeWarning, match="by Pillow, more slowly.*no gcc, cc or clang on PATH"):
        assert_pillows(image, image.size, AFFINE, (1, 0.5, 0, 0, 1, 0), resample=BICUBIC)
