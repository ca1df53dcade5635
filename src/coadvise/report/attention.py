"""Pictures darkened where a token does not look."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIDE = 160  # pixels of the shorter side, at least
FAINT = 0.15  # of the light that is left where a token does not look
GAP, LINE = 6, 14  # pixels between the pictures of a sheet, and of its heading


def darkened(picture: Image.Image, attention: npt.NDArray[np.floating]) -> Image.Image:
    """The picture, enlarged if it is small, as bright at each place as a token attends to it.

    Args:
        picture: RGB, as the network sees it.
        attention: [H', W'] over the patches; its largest value is full light.
    """
    scale = max(1, -(-SIDE // min(picture.size)))
    size = (picture.width * scale, picture.height * scale)
    light = Image.fromarray((255 * attention / max(float(attention.max()), 1e-12)).astype(np.uint8))
    mask = np.asarray(light.resize(size, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    pixels = np.asarray(picture.resize(size, Image.Resampling.NEAREST), np.float32)
    return Image.fromarray((pixels * (FAINT + (1 - FAINT) * mask)).astype(np.uint8))


def sheet(columns: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows, under the names of the columns."""
    width, height = rows[0][0].size
    size = (len(columns) * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP + LINE)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for column, name in enumerate(columns):
        pen.text((GAP + column * (width + GAP), GAP), name, fill="black")
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            page.paste(picture, (GAP + column * (width + GAP), LINE + GAP + line * (height + GAP)))
    return page


def encoded(picture: Image.Image, kind: str) -> bytes:
    """A file of that kind, "JPEG" or "PNG"."""
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()
