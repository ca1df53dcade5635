"""Features without a network tell colours and edges apart, whatever a picture's size."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from coadvise.inspection.features import cheap_features


def striped(side: int, upright: bool, colour: str) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    for start in range(0, side, side // 6):
        box = (start, 0, start + side // 12, side) if upright else (0, start, side, start + side // 12)
        ImageDraw.Draw(image).rectangle(box, fill=colour)
    return image


def test_they_differ_by_colour_and_direction_more_than_by_size() -> None:
    def distance(one: Image.Image, other: Image.Image) -> float:
        return float(np.linalg.norm(cheap_features(one) - cheap_features(other)))

    same = distance(striped(48, True, "red"), striped(240, True, "red"))
    assert distance(striped(48, True, "red"), striped(48, False, "red")) > 1.5 * same
    assert distance(striped(48, True, "red"), striped(48, True, "blue")) > 1.5 * same


@pytest.mark.parametrize("size", [(1, 1), (8, 300), (48, 48)])
def test_any_picture_has_them(size: tuple[int, int]) -> None:
    found = cheap_features(Image.new("RGB", size, "grey"))
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert len(found) == len(cheap_features(striped(96, True, "red")))
