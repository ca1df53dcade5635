"""What a picture looks like by its edges and colours alone, where no network is at hand."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from coadvise.data.images import fitted

Floats = npt.NDArray[np.float32]
CELLS, DIRECTIONS = 6, 8  # of the edges, a side and of half a turn
SIDE, SMALL = 48, 8  # pixels: where edges and colours are counted; the very small copy


def cheap_features(image: Image.Image) -> Floats:
    """Edges by place and direction (as in HOG), colours, and a very small copy: [D] float32."""
    pixels = np.asarray(fitted(image, SIDE)).astype(np.float32) / 255
    down, right = np.gradient(pixels.mean(2))
    strength, angle = np.hypot(down, right), np.arctan2(down, right) % np.pi
    bins = np.minimum((angle / np.pi * DIRECTIONS).astype(int), DIRECTIONS - 1)
    cell = np.arange(SIDE) * CELLS // SIDE
    place = (cell[:, None] * CELLS + cell) * DIRECTIONS + bins
    edges = np.bincount(place.ravel(), strength.ravel(), CELLS**2 * DIRECTIONS) / (strength.sum() + 1e-6)
    levels = np.minimum((pixels * 4).astype(int), 3)
    colours = np.bincount((levels @ [16, 4, 1]).ravel(), minlength=64) / SIDE**2
    small = np.asarray(fitted(image, SMALL)).ravel() / 255
    directions = edges.reshape(-1, DIRECTIONS).sum(0)
    return np.concatenate([np.sqrt(edges), np.sqrt(directions), np.sqrt(colours), small, [strength.mean()]]).astype(
        np.float32
    )
