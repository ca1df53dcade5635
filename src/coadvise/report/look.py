"""A picture darkened where a token does not look."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 160  # pixels of the shorter side, at least
FAINT = 0.15  # of the light that is left where nothing is looked at


def darkened(picture: Image.Image, look: npt.NDArray[np.floating]) -> Image.Image:
    """The picture, enlarged if it is small, as bright as a token looks at each place.

    Args:
        picture: RGB, as the network sees it.
        look: [H', W'] over the patches; its largest value is full light.
    """
    scale = max(1, -(-SIDE // min(picture.size)))
    size = (picture.width * scale, picture.height * scale)
    light = Image.fromarray((255 * look / max(float(look.max()), 1e-12)).astype(np.uint8))
    mask = np.asarray(light.resize(size, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    pixels = np.asarray(picture.resize(size, Image.Resampling.NEAREST), np.float32)
    return Image.fromarray((pixels * (FAINT + (1 - FAINT) * mask)).astype(np.uint8))


def encoded(picture: Image.Image) -> bytes:
    """As a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
