"""The pictures of a split that look most like a picture to a network: cosine similarity of its features."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coadvise.config.schema import ImageSize
from coadvise.data.decoding import threaded
from coadvise.data.images import Pixels
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources.split import evenly
from coadvise.models.network import Network
from coadvise.training.loop import Progress

MOST = 3000  # pictures that are compared with, evenly chosen
BATCH = 64


class Nearest:
    """Pictures of a split, by what a network's class token is of each before the head.

    Args:
        network: In evaluation mode, on the CPU.
        split: Pictures of the network's own data.
        progress: Told of the pictures done, as "pictures".

    Attributes:
        rows: Those of the split that are compared with, in order.

    Raises:
        UnreadableImageError: A picture can no longer be read.
    """

    def __init__(self, network: Network, split: ScannedSplit, progress: Progress) -> None:
        self.network = network
        self.rows = evenly(len(split), MOST)
        pixels = _pixels(split, network.image_size, self.rows)
        found: list[Tensor] = []
        for start in range(0, len(self.rows), BATCH):
            some = np.stack([next(pixels) for _ in self.rows[start : start + BATCH]])
            found.append(self._directions(torch.from_numpy(some).float().div_(255)))
            progress("pictures", min(start + BATCH, len(self.rows)), len(self.rows), {})
        self.directions = torch.cat(found)

    def __call__(self, images: Tensor, count: int) -> list[tuple[int, float]]:
        """The rows nearest to an image [1, 3, H, W] in 0..1, the nearest first, with their cosine similarity."""
        similar = (self.directions @ self._directions(images).T)[:, 0]
        best = similar.topk(min(count, len(similar)))
        return [(self.rows[place], value) for value, place in zip(*map(Tensor.tolist, best), strict=True)]

    @torch.inference_mode()
    def _directions(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D]."""
        return F.normalize(self.network.features(images).flatten(1).float())


def _pixels(split: ScannedSplit, size: ImageSize, rows: Sequence[int]) -> Iterator[Pixels]:
    """Pictures as networks are scored on them, [3, H, W] each."""
    if split.pixels is not None:
        return (split.pixels[row] for row in rows)
    return threaded(lambda row: split.still(row, size), rows)
