"""Made splits for tests of views and loaders."""

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from coadvise.config.schema import AugmentConfig, ImageSize, sides
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources.folder import FolderSplit
from coadvise.data.views import Batch, Views

NOTHING = AugmentConfig(kind="none")
EVERYTHING = AugmentConfig(
    kind="light", shift=0.2, zoom=0.2, rotate=20, colour=0.3, erase=0.5, mixup=0.8, cutmix=1.0, mix_probability=0.7,
    smoothing=0.1,
)  # fmt: skip


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """An image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def files(*paths: Path | str, labels: Iterable[int] = ()) -> FolderSplit:
    """Files as a split, all of class 0 unless labels are given; they need not exist."""
    found = np.array([*labels] or [0] * len(paths), np.int64)
    return FolderSplit.of(Path(), map(str, paths), found)


def made_split(images: int, size: ImageSize = 12, classes: int = 3) -> ScannedSplit:
    """Random pixels without files."""
    pixels = np.random.default_rng(images).integers(0, 256, (images, 3, *sides(size)), dtype=np.uint8)
    split = files(*map(str, range(images)), labels=(np.arange(images) % classes).tolist())
    return ScannedSplit(split, split.labels, pixels, (), Counter())


def made_views(images: int, augment: AugmentConfig, size: ImageSize = 12, classes: int = 3, seed: int = 0) -> Views:
    return Views(made_split(images, size, classes), augment, classes, size, seed)


def joined(batches: Iterable[Batch]) -> Batch:
    """Consecutive batches of one epoch as one."""
    parts = list(batches)
    assert len({part.epoch for part in parts}) == 1
    return Batch(
        *(torch.cat([getattr(part, field) for part in parts]) for field in ("images", "labels", "index")),
        parts[0].epoch,
    )


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are the same to the last bit."""
    fields = ((one.images, other.images), (one.labels, other.labels), (one.index, other.index))
    return one.epoch == other.epoch and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in fields)
