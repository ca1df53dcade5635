"""Pictures that perceptual hashes and simple features can tell apart."""

import io

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")


def picture(rng: np.random.Generator, label: int, side: int = 48) -> Image.Image:
    """Soft shapes, tinted by the class."""
    grid = rng.integers(0, 150, (6, 6, 3), dtype=np.uint8)
    grid[..., 2 - label] += 100
    return Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
