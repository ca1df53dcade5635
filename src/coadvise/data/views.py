"""Views: images as a training step sees them, each a pure function of (seed, epoch, position).

An epoch is an order of all training images, decided by (seed, epoch). What happens to the image at a position, with
which other it is mixed and how much, is decided by (seed, epoch, image) and (seed, epoch, position) alone, so views do
not depend on batches, workers, processes or resuming. Mix partners are neighbours in the order: mostly in one batch.

Draws are numbers of the CPU; what they are done with happens where the pixels are. On a CUDA device that is the device
itself if all images are in memory and fit: the same views, up to the device's rounding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import betaincinv
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from coadvise.config import AugmentConfig
from coadvise.data import draws
from coadvise.data.images import Pixels, UnreadableImageError, read_image, square, to_array
from coadvise.data.pipeline import IMAGENET_MEAN, IMAGENET_STD, Pipeline
from coadvise.data.scan import ScannedSplit
from coadvise.data.workers import taking_up
from coadvise.errors import UserError

Indices = npt.NDArray[np.int64]

# Raised with every change after which a view looks otherwise: logits stored for the old ones are then refused.
VIEWS = 1
MOST_SKIPPED = 100  # files in a row that can be skipped; more of them are a disk that has gone


@dataclass(frozen=True)
class Batch:
    """All that crosses from data to training.

    images: [B, 3, H, W] float32 in 0..1, not normalised: each network does that by its own figures.
    labels: [B] int64, or [B, K] float32 when mixed or smoothed.
    index: [B] int64, which training image each view is of.
    epoch: int, the epoch whose views these are: where views are recycled, an earlier one than the loop's.
    unreadable: a line for each file that could not be read for it, by its place in the split; see `Views`.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    epoch: int
    unreadable: Mapping[int, str] = field(default_factory=dict)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> "Batch":
        """The batch on a device, images laid out as the networks run."""
        images = self.images.to(device, non_blocking=True, memory_format=memory_format)
        return replace(self, images=images, labels=self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the loader, so that copies to a CUDA device do not wait."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Views(TorchDataset[Batch]):
    """Training views of a split, asked for as (epoch, positions in that epoch's order).

    In place of an image whose file can no longer be read there stands the next in the split that can: that image's own
    view of the epoch, with its own label and index.
    """

    def __init__(self, split: ScannedSplit, augment: AugmentConfig, classes: int, image_size: int, seed: int) -> None:
        self.split, self.augment, self.classes, self.image_size, self.seed = split, augment, classes, image_size, seed
        self._resident: Tensor | None = None  # all pixels, on the device that makes the views
        self._order: tuple[int, Indices] = (-1, np.empty(0, np.int64))
        self._pipeline = Pipeline(augment, image_size) if augment.kind == "deit" else None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def device(self) -> torch.device:
        """Where views are made, and batches come out."""
        return torch.device("cpu") if self._resident is None else self._resident.device

    def on(self, device: torch.device) -> "Views":
        """The same views made on a CUDA device, if all images are in memory and take a quarter of its free memory."""
        pixels = self.split.pixels
        if device.type != "cuda" or pixels is None or self._pipeline is not None:
            return self
        return self.resident(device) if pixels.nbytes <= torch.cuda.mem_get_info(device)[0] // 4 else self

    def resident(self, device: torch.device) -> "Views":
        """The same views made on any device, by a copy of all pixels there."""
        views = Views(self.split, self.augment, self.classes, self.image_size, self.seed)
        views._resident = torch.from_numpy(self.split.pixels).to(device)
        return views

    def drawn(self, epoch: int) -> int:
        """The epoch whose order and views an epoch sees: itself, or an earlier one where views are recycled."""
        return epoch % self.augment.recycle if self.augment.recycle else epoch

    def order(self, epoch: int) -> Indices:
        """The images' order in an epoch, [N]."""
        epoch = self.drawn(epoch)
        if self._order[0] != epoch:
            self._order = (epoch, draws.permutation(self.seed, draws.ORDER, epoch, len(self)))
        return self._order[1]

    def __getitem__(self, request: tuple[int, Indices]) -> Batch:
        epoch, positions = self.drawn(request[0]), request[1]
        order, augment = self.order(epoch), self.augment
        unreadable: dict[int, str] = {}
        mixing = augment.mixup > 0 or augment.cutmix > 0
        if not mixing:
            images, index = self._single_views(epoch, order[positions], unreadable)
        else:
            partners = positions ^ 1
            partners[partners >= len(order)] = len(order) - 1  # the last of an odd number is mixed with itself
            every, where = np.unique(np.concatenate([positions, partners]), return_inverse=True)
            views, shown = self._single_views(epoch, order[every], unreadable)
            own, other = _sent(where, views.device).chunk(2)
            index, partner = np.split(shown[where], 2)
            images, share = self._mix(epoch, positions, views[own], views[other])
        labels = self._labels(index)
        if mixing or augment.smoothing > 0:
            target = _smooth(labels, self.classes, augment.smoothing)
            if mixing:
                other_target = _smooth(self._labels(partner), self.classes, augment.smoothing)
                target = share * target + (1 - share) * other_target
            labels = target
        return Batch(images, labels, torch.from_numpy(index), epoch, unreadable)

    def _single_views(self, epoch: int, wanted: Indices, unreadable: dict[int, str]) -> tuple[Tensor, Indices]:
        """[B, 3, S, S] in 0..1, before mixing, and which images they are of."""
        index = wanted.copy()
        if self._pipeline is not None:
            seeds = self._pipeline_seeds(epoch, index)
            images = self._pipeline.views(self._files(epoch, index, seeds, unreadable), seeds)
        else:
            images = self._pixels(index, unreadable).float().div_(255)
        if self.augment.kind == "light":
            images = light_views(images, self.augment, draws.uniforms(self.seed, draws.GEOMETRY, epoch, index, 9))
        if self.augment.erase > 0:
            u = draws.uniforms(self.seed, draws.ERASE, epoch, index, 5)
            erase_(images, self.augment.erase, u, index, epoch, self.seed)
        return images, index

    def _labels(self, index: Indices) -> Tensor:
        return _sent(self.split.labels[index], self.device)

    def _pipeline_seeds(self, epoch: int, index: Indices) -> list[int]:
        return (draws.seeds(self.seed, draws.PIPELINE, epoch, index) >> np.uint64(1)).tolist()

    def _files(
        self, epoch: int, index: Indices, seeds: list[int], unreadable: dict[int, str]
    ) -> Iterator[Image.Image | Pixels]:
        """Images of any size, one at a time; where another stands in, `index` and `seeds` become its own, in place."""
        for row, wanted in enumerate(index.tolist()):
            if self.split.presized is not None:
                yield self.split.presized[wanted]
                continue
            image, index[row] = self._read(wanted, unreadable)
            if index[row] != wanted:
                seeds[row] = self._pipeline_seeds(epoch, index[row : row + 1])[0]
            yield image

    def _read(self, index: int, unreadable: dict[int, str]) -> tuple[Image.Image, int]:
        """An image and its place in the split: the one asked for, or the next that can be read."""
        for place in range(index, index + min(MOST_SKIPPED, len(self))):
            taking_up(place % len(self))
            try:
                return read_image(self.split.paths[place % len(self)]), place % len(self)
            except UnreadableImageError as error:
                unreadable[place % len(self)] = str(error)
        raise UserError(
            f"{min(MOST_SKIPPED, len(self))} training images in a row can no longer be read; the first is "
            f"{unreadable[index]}; see to it that '{self.split.paths[index].parent}' is there, and run again to go on"
        )

    def _pixels(self, index: Indices, unreadable: dict[int, str]) -> Tensor:
        """Images [B, 3, S, S] uint8; `index` is changed in place as by `_files`."""
        if self._resident is not None:
            return self._resident[_sent(index, self.device)]
        if self.split.pixels is not None:
            return torch.from_numpy(self.split.pixels[index])
        arrays = []
        for row, wanted in enumerate(index.tolist()):
            image, index[row] = self._read(wanted, unreadable)
            arrays.append(to_array(square(image, self.image_size)))
        return torch.from_numpy(np.stack(arrays))

    def _mix(self, epoch: int, positions: Indices, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup or cutmix with the neighbour. Returns images and each view's own share of the label, [B, 1]."""
        augment = self.augment
        u = draws.uniforms(self.seed, draws.MIX, epoch, positions // 2, 5)  # a pair's two views share their draws
        cut = u[:, 1] < (0.5 if augment.mixup > 0 and augment.cutmix > 0 else float(augment.cutmix > 0))
        alpha = np.where(cut, augment.cutmix, augment.mixup)
        share = np.where(u[:, 0] < augment.mix_probability, betaincinv(alpha, alpha, u[:, 2]), 1.0)
        size = own.shape[-1]
        half = np.sqrt(1 - share) * size / 2
        centre = u[:, 3:5] * size
        low = np.clip(np.rint(centre - half[:, None]), 0, size)
        high = np.clip(np.rint(centre + half[:, None]), 0, size)
        share = np.where(cut, 1 - np.prod(high - low, axis=1) / size**2, share)
        blend = np.where(cut, 1.0, share)
        corners = _sent(np.stack([low, high], 1), own.device)
        shares, blends, cuts = _sent(np.stack([share, blend, cut]), own.device).float()[:, :, None]
        box = _boxes(corners, size) & (cuts[:, :, None, None] > 0)
        return torch.where(box, other, other.lerp(own, blends[:, :, None, None])), shares


def _sent(values: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Values from the host where views are made; a CUDA device is not waited for, which pinned memory allows."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def light_views(images: Tensor, augment: AugmentConfig, u: draws.Array) -> Tensor:
    """Moves, zooms, turns, flips and recolours a batch: one affine resampling with mirrored borders, then colour.

    Args:
        images: [B, 3, H, W] in 0..1.
        u: uniforms [B, 9].
    """
    draw = torch.from_numpy(2 * u - 1).float()  # -1..1
    mirror = torch.where(draw[:, 0] < 0, -1.0, 1.0) if augment.flip else torch.ones(len(draw))
    zoom = 1 + augment.zoom * draw[:, 1]
    angle = torch.deg2rad(augment.rotate * draw[:, 2])
    size = images.shape[-1]
    shift = augment.shift * 2 * draw[:, 3:5]
    turned = augment.zoom > 0 or augment.rotate > 0
    if not turned:  # whole pixels: nothing is blurred
        shift = (shift * size / 2).round() * 2 / size
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack([cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(_sent(theta, images.device), list(images.shape), align_corners=False)
    mode = "bilinear" if turned else "nearest"
    images = F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)
    if augment.colour > 0:
        factors = _sent(1 + augment.colour * draw[:, 5:8], images.device)
        brightness, contrast, saturation = factors.T[:, :, None, None, None]
        images = images * brightness
        images = images.mean((1, 2, 3), keepdim=True).lerp(images, contrast)
        images = images.mean(1, keepdim=True).lerp(images, saturation).clamp_(0, 1)
    return images


def erase_(images: Tensor, probability: float, u: draws.Array, index: Indices, epoch: int, seed: int) -> None:
    """Random erasing (Zhong et al. 2020), in place: noise on a rectangle of 2-33 % of the area, aspect 0.3-3.3."""
    size = images.shape[-1]
    area = (0.02 + u[:, 1] * (1 / 3 - 0.02)) * size**2
    aspect = np.exp((2 * u[:, 2] - 1) * np.log(10 / 3))
    sides = np.clip(np.rint(np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1)), 1, size - 1)
    low = np.floor(u[:, 3:5] * (size - sides + 1))
    for row in np.flatnonzero(u[:, 0] < probability):
        (top, left), (height, width) = low[row].astype(int), sides[row].astype(int)
        generator = torch.Generator().manual_seed(draws.scalar_seed(seed, draws.ERASE, epoch, int(index[row])))
        noise = torch.randn(3, height, width, generator=generator)
        noise = noise * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
        images[row, :, top : top + height, left : left + width] = noise


def _boxes(corners: Tensor, size: int) -> Tensor:
    """[B, 1, size, size] masks of boxes, given as [B, 2, 2] (low and high, row and column)."""
    steps = torch.arange(size, device=corners.device)
    inside = (steps >= corners[:, 0, :, None]) & (steps < corners[:, 1, :, None])
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


def _smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[B, K]: 1 - smoothing on the label, the rest spread over all classes."""
    target = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return target.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
