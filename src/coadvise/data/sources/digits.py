"""The handwritten digits that come with scikit-learn: 1,797 real pictures of 8x8 pixels, with nothing to download."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from coadvise.data.sources.split import Labels, Source, Split

TO_LEARN = 30  # of each class, so that there is something to gain; the others are scored


@dataclass(frozen=True, eq=False)
class _Embedded(Split):
    pictures: tuple[tuple[str, bytes], ...]  # name and PNG
    labels: Labels

    def name(self, index: int) -> str:
        return self.pictures[index][0]

    def read(self, index: int) -> bytes:
        return self.pictures[index][1]

    def stamp(self, index: int) -> str:
        return "embedded"

    def subset(self, rows: Sequence[int] | Labels, labels: Labels | None = None) -> Split:
        labels = self.labels[np.asarray(rows, np.int64)] if labels is None else labels
        return _Embedded(tuple(self.pictures[int(row)] for row in rows), labels)


@cache
def open_digits() -> Source:
    """The first 30 pictures of each class to train on, the others to score; both ordered by class, then by number."""
    from PIL import Image
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()

    def png(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray((digits.images[number] * 255 / 16).round().astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    def split(name: str, part: slice) -> Split:
        numbers = [np.flatnonzero(digits.target == label)[part] for label in range(10)]
        pictures = [(f"{name}/{k}/{n:04d}.png", png(n)) for k, members in enumerate(numbers) for n in members]
        return _Embedded(tuple(pictures), np.repeat(np.arange(10), [len(members) for members in numbers]))

    train, val = split("train", slice(TO_LEARN)), split("test", slice(TO_LEARN, None))
    note = f"{TO_LEARN} images of each class to train on, all others to score"
    return Source("digits", tuple("0123456789"), train, val, note)
