"""A file with preprocessing inside gives what `predict` gives, for pictures of any size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from coadvise import export, fit
from coadvise.config.schema import Fit, ImageSize, sides
from coadvise.data.images import fitted, to_array
from coadvise.deploy.publish import load

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
from coadvise.deploy.onnx_file import in_onnx_runtime, to_bytes, to_onnx
from coadvise.deploy.preprocess import with_preprocessing

# Width and height: strips of which only the middle is used, single rows, the size itself, one pixel.
SHAPES = ((64, 85), (17, 333), (333, 17), (5, 400), (1, 300), (16, 16), (31, 20), (7, 3), (1, 1), (301, 300))


class Pixels(nn.Module):
    """Answers the pixels it is given, [B, 3 * H * W]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * 1


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [16, (20, 31)])
def test_pixels_are_those_that_networks_are_scored_on(how: Fit, size: ImageSize, photos: Path) -> None:
    with_it = with_preprocessing(to_onnx(Pixels(), torch.rand(2, 3, *sides(size))), size, how)
    seen = in_onnx_runtime(to_bytes(with_it))
    photo = Image.open(sorted(photos.rglob("*.jpg"))[0]).convert("RGB")
    for shape in SHAPES:
        picture = photo.resize(shape)
        expected = to_array(fitted(picture, size, how)).reshape(-1).astype(float)
        found = 255 * seen(np.asarray(picture))
        assert np.abs(found - expected).max() < 1.01, shape
        assert np.abs(found - expected).mean() < 0.3, shape


def test_probabilities_are_those_of_predict_on_photographs(photos: Path, tiny_preset: str, tmp_path: Path) -> None:
    run = fit(photos, tiny_preset, tmp_path / "run", overrides=["data.fit=pad", "student.recipe.epochs=20"])
    paths = sorted((photos / "test").rglob("*.jpg"))
    expected = np.array([[*found.probabilities.values()] for found in load(run).predict(paths)])
    assert expected.std(0).max() > 0.02  # answers differ from picture to picture
    for options in ({}, {"int8": True, "allow_loss": True}):
        about = export(run, tmp_path / "student.onnx", preprocess=True, **options)
        assert about["input"] == {"name": "image", "shape": ["height", "width", 3], "dtype": "uint8", "range": [0, 255]}
        answer = in_onnx_runtime((tmp_path / "student.onnx").read_bytes())
        upright = (ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths)
        found = np.stack([answer(np.asarray(picture)) for picture in upright])
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < (0.05 if options else 0.01)
