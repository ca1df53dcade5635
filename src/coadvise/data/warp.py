"""Rotating, shearing and shifting RGB images with bicubic interpolation: Pillow's pixels, two to three times as fast.

Pillow takes a third of the time of DeiT's views for these moves. Without a C compiler they are its own.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coadvise.ops import native

SOURCE = Path(__file__).with_name("warp_cpu.c")


class Warped:
    """Stands for an image, but has affine maps of its plane made by the native kernel where that is Pillow's equal."""

    rotate = Image.Image.rotate  # ends in `transform`

    def __init__(self, image: Image.Image) -> None:
        self._image = image

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image, name)

    def transform(
        self,
        size: tuple[int, int],
        method: Any,
        data: Any = None,
        resample: int = Image.Resampling.NEAREST,
        **rest: Any,
    ) -> Image.Image:
        """As Pillow's."""
        image, fill = self._image, rest.get("fillcolor") or (0, 0, 0)
        if (
            (method, resample, image.mode) == (Image.Transform.AFFINE, Image.Resampling.BICUBIC, "RGB")
            and tuple(size) == image.size
            and isinstance(fill, tuple)
            and len(fill) == 3
            and rest.keys() <= {"fillcolor"}
            and (warp := _kernel()) is not None
        ):
            width, height = image.size
            out = np.empty((height, width, 4), np.uint8)
            matrix = (ctypes.c_double * 6)(*data[:6])
            if warp(image.tobytes("raw", "RGBX"), height, width, matrix, bytes((*fill, 0)), out.ctypes.data):
                raise MemoryError(f"no memory to move an image of {width}x{height} pixels")
            return Image.frombytes("RGB", image.size, out.data, "raw", "RGBX")
        return image.transform(size, method, data, resample, **rest)


@cache
def _kernel() -> Callable[..., int] | None:
    library = native.load(SOURCE, "images are rotated and sheared by Pillow, more slowly", "-ffp-contract=off")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    return native.function(library, "warp", ctypes.c_char_p, count, count, pointer, ctypes.c_char_p, pointer)
