"""Random erasing (Zhong et al. 2020): noise on a rectangle of 2-33 % of the area, aspect 0.3-3.3."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coadvise.data import draws
from coadvise.data.pipeline import IMAGENET_MEAN, IMAGENET_STD


class Patch(NamedTuple):
    """What is put on a picture of a batch, and where.

    Attributes:
        row: of the picture.
        noise: [3, height, width].
    """

    row: int
    top: int
    left: int
    noise: Tensor


def patches(
    size: tuple[int, int], probability: float, seed: int, epoch: int, index: npt.NDArray[np.int64]
) -> Iterator[Patch]:
    """What is erased of pictures of that height and width, by their rows in the split [B]."""
    whole, u = np.array(size), draws.uniforms(seed, draws.ERASE, epoch, index, 5)
    area = (0.02 + u[:, 1] * (1 / 3 - 0.02)) * np.prod(whole)
    aspect = np.exp((2 * u[:, 2] - 1) * np.log(10 / 3))
    sides = np.clip(np.rint(np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1)), 1, whole - 1)
    low = np.floor(u[:, 3:5] * (whole - sides + 1))
    for row in np.flatnonzero(u[:, 0] < probability).tolist():
        (top, left), (height, width) = low[row].astype(int).tolist(), sides[row].astype(int).tolist()
        generator = torch.Generator().manual_seed(draws.scalar_seed(seed, draws.ERASE, epoch, int(index[row])))
        noise = torch.randn(3, height, width, generator=generator)
        noise = noise * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
        yield Patch(row, top, left, noise)


def erase_(images: Tensor, patch: Patch) -> None:
    """Puts a patch on its picture of a batch [B, 3, H, W], in place."""
    row, top, left, noise = patch
    height, width = noise.shape[1:]
    images[row, :, top : top + height, left : left + width] = noise
