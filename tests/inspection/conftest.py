"""A folder of made pictures with planted faults, and what `check` finds in it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_pictures import CLASSES, encoded, picture
from PIL import Image

from coadvise.inspection.check import check
from coadvise.inspection.findings import Findings


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ (12 a class) and val/ (5 a class), and besides them one of each fault. To be read only."""
    root, rng = tmp_path_factory.mktemp("faulty"), np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 5)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                picture(rng, label).save(root / split / name / f"{number}.png")
    train, val = root / "train", root / "val"
    shutil.copy(train / "red" / "0.png", val / "red" / "copy.png")
    shutil.copy(train / "blue" / "1.png", train / "green" / "two.png")
    small = Image.open(train / "blue" / "0.png").resize((36, 36), Image.Resampling.BICUBIC)
    (val / "blue" / "small.jpg").write_bytes(encoded(small, "JPEG", quality=80))
    picture(rng, 0).save(train / "red" / "wrong.png")
    (train / "red" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="session")
def found(faulty: Path) -> Findings:
    return check(faulty)
