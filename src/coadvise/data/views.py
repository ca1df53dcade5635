"""Views: images as a training step sees them, each a pure function of (seed, epoch, position).

An epoch is an order of all training images, a function of (seed, epoch). How an image is augmented, and with which
other it is mixed, is a function of (seed, epoch, image) and (seed, epoch, position) alone, so views do not depend on
batches, workers, processes or resuming. Images are mixed with neighbours in the order, mostly within a batch.

Random numbers are drawn on the CPU and applied where the pixels are: on the CUDA device if all images are in memory and
fit there, which gives the same views up to the device's rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from coadvise.config.schema import AugmentConfig, ImageSize
from coadvise.data import draws
from coadvise.data.balance import balanced_order
from coadvise.data.images import DecodedImage, Pixels, UnreadableImageError
from coadvise.data.order import WindowedOrder, shuffled
from coadvise.data.pipeline import IMAGENET_MEAN, IMAGENET_STD, Pipeline
from coadvise.data.scanned import ScannedSplit
from coadvise.data.workers import mark_reading
from coadvise.errors import UserError

T = TypeVar("T")
Indices = npt.NDArray[np.int64]

# The version of views. Raise it with every change that alters them: stored logits of older views are then refused.
VIEWS = 1
MOST_SKIPPED = 100  # unreadable pictures in a row; more of them mean that the disk is gone


@dataclass(frozen=True)
class Batch:
    """What data gives to training.

    Attributes:
        images: [B, 3, H, W] float32 in 0..1, not normalised: each network does that with its own mean and deviation.
        labels: [B] int64, or [B, K] float32 when mixed or smoothed.
        index: [B] int64, the row of each view's image in the training split.
        epoch: whose views these are; where views are recycled, an earlier one than the loop's.
        unreadable: a line for each picture that could not be read, by its row; see `Views`.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    epoch: int
    unreadable: Mapping[int, str] = field(default_factory=dict)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> "Batch":
        """The batch on a device, images in the networks' memory format."""
        images = self.images.to(device, non_blocking=True, memory_format=memory_format)
        return replace(self, images=images, labels=self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by PyTorch's loader; copies from pinned memory to a CUDA device are asynchronous."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Request(NamedTuple):
    """Some views of an epoch.

    Attributes:
        epoch: whose views they are.
        places: their positions in its order, and then, where images are mixed, those of their partners.
        rows: of the images there.
    """

    epoch: int
    places: Indices
    rows: Indices


class Views(TorchDataset[Batch]):
    """Training views of a split, indexed by a request, or by (epoch, positions in that epoch's order).

    An image that can no longer be read is replaced by the next in the split that can: that image's own view of the
    epoch, with its own label and index.
    """

    def __init__(
        self,
        split: ScannedSplit,
        augment: AugmentConfig,
        classes: int,
        image_size: ImageSize,
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.split, self.augment, self.classes, self.image_size, self.seed = split, augment, classes, image_size, seed
        self.weights = weights  # how often each class is shown; None: every image once an epoch
        self._resident: Tensor | None = None  # all pixels, on the device that makes the views
        self._order: tuple[int, Indices] = (-1, np.empty(0, np.int64))
        windows = split.split.windows()
        self._windows = None if windows is None else WindowedOrder(seed, *windows)
        self._soon = (-1, -1)  # epoch and window whose shards are fetched
        self._pipeline = Pipeline(augment, image_size, split.fit) if augment.kind == "deit" else None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def device(self) -> torch.device:
        """Where views are made, and batches are."""
        return torch.device("cpu") if self._resident is None else self._resident.device

    def on(self, device: torch.device) -> "Views":
        """The same views made on a CUDA device, if all images are in memory and fit in a quarter of its free memory."""
        pixels = self.split.pixels
        if device.type != "cuda" or pixels is None or self._pipeline is not None:
            return self
        return self.resident(device) if pixels.nbytes <= torch.cuda.mem_get_info(device)[0] // 4 else self

    def resident(self, device: torch.device) -> "Views":
        """The same views made on any device, from a copy of all pixels there."""
        views = Views(self.split, self.augment, self.classes, self.image_size, self.seed, self.weights)
        views._resident = torch.from_numpy(self.split.pixels).to(device)
        return views

    def drawn(self, epoch: int) -> int:
        """The epoch whose order and views an epoch uses: itself, or an earlier one where views are recycled."""
        return epoch % self.augment.recycle if self.augment.recycle else epoch

    def order(self, epoch: int) -> Indices:
        """The rows of the images in an epoch's order, [N]: each once, or by the weights of their classes."""
        return self._rows(self.drawn(epoch), np.arange(len(self)))

    def _rows(self, epoch: int, places: Indices) -> Indices:
        """The rows at some places of the order that an epoch has drawn."""
        if self._windows is not None and self.weights is None:
            return self._windows.rows(epoch, places)
        if self._order[0] != epoch:
            if self.weights is None:
                order = shuffled(self.seed, epoch, np.arange(len(self)))
            else:
                order = balanced_order(self.seed, epoch, self.split.labels, self.weights)
            self._order = (epoch, order)
        return self._order[1][places]

    def request(self, epoch: int, positions: Indices) -> Request:
        """What to index the views with. Loader processes so need no order, which takes 10 MB for a million images."""
        epoch, places = self.drawn(epoch), positions
        if self._mixing:
            partners = positions ^ 1
            partners[partners >= len(self)] = len(self) - 1  # the last of an odd number is mixed with itself
            places = np.concatenate([positions, partners])
        if self._reads and len(positions):
            self._bring_soon(epoch, int(positions[-1]))
        return Request(epoch, places, self._rows(epoch, places))

    @property
    def _reads(self) -> bool:
        """Whether pictures are read for each view."""
        return self._resident is None and self.split.pixels is None and self.split.presized is None

    def _bring_soon(self, epoch: int, position: int) -> None:
        """Has fetched, in the background, what this window and the next need."""
        order = self._windows
        if order is None:
            return
        number = order.number(epoch, position)
        if self._soon != (epoch, number):
            self._soon = (epoch, number)
            rows = np.concatenate([order.members(epoch, number + ahead) for ahead in (0, 1)])
            self.split.split.bring_soon(rows)

    @property
    def _mixing(self) -> bool:
        return self.augment.mixup > 0 or self.augment.cutmix > 0

    def __getitem__(self, request: Request | tuple[int, Indices]) -> Batch:
        epoch, places, rows = request if isinstance(request, Request) else self.request(*request)
        augment, mixing = self.augment, self._mixing
        positions = places[: len(places) // 2] if mixing else places
        unreadable: dict[int, str] = {}
        if not mixing:
            images, index = self._single_views(epoch, rows, unreadable)
        else:
            _, first, where = np.unique(places, return_index=True, return_inverse=True)
            views, shown = self._single_views(epoch, rows[first], unreadable)
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
        """[B, 3, H, W] in 0..1, before mixing, and the row of each view's image."""
        if self._reads and len(wanted):
            self.split.split.bring(wanted, partial(mark_reading, int(wanted[0])))
        if self._pipeline is not None:
            images, index = self._pipeline_views(self._pipeline, epoch, wanted, unreadable)
        else:
            pixels, index = self._pixels(wanted, unreadable)
            images = pixels.float().div_(255)
        if self.augment.kind == "light":
            images = light_views(images, self.augment, draws.uniforms(self.seed, draws.GEOMETRY, epoch, index, 9))
        if self.augment.erase > 0:
            u = draws.uniforms(self.seed, draws.ERASE, epoch, index, 5)
            erase_(images, self.augment.erase, u, index, epoch, self.seed)
        return images, index

    def _labels(self, index: Indices) -> Tensor:
        return _sent(self.split.labels[index], self.device)

    def _pipeline_views(
        self, pipeline: Pipeline, epoch: int, wanted: Indices, unreadable: dict[int, str]
    ) -> tuple[Tensor, Indices]:
        """DeiT's views of images of any size, read one at a time, and the row of each view's image."""
        presized, shown = self.split.presized, list[int]()

        def look(row: int) -> tuple[DecodedImage | Pixels, int]:
            seed = draws.scalar_seed(self.seed, draws.PIPELINE, epoch, row)
            return self.split.decoded(row, pipeline.need(seed)) if presized is None else presized[row], seed

        def images() -> Iterator[tuple[DecodedImage | Pixels, int]]:
            for row in wanted.tolist():
                seen, at = self._read(row, unreadable, look)
                shown.append(at)
                yield seen

        return pipeline.views(images(), len(wanted)), np.array(shown, np.int64)

    def _read(self, row: int, unreadable: dict[int, str], read: Callable[[int], T]) -> tuple[T, int]:
        """What `read` gives of an image, and its row: the one asked for, or the next that can be read."""
        tried = min(MOST_SKIPPED, len(self))
        for at in (place % len(self) for place in range(row, row + tried)):
            mark_reading(at)
            try:
                return read(at), at
            except UnreadableImageError as error:
                unreadable[at] = str(error)
        raise UserError(
            f"{tried} training images in a row can no longer be read; the first is {unreadable[row]}; check that their "
            "folder or disk is there, and run the same command again to go on"
        )

    def _pixels(self, wanted: Indices, unreadable: dict[int, str]) -> tuple[Tensor, Indices]:
        """Images [B, 3, H, W] uint8, and the row of each."""
        if self._resident is not None:
            return self._resident[_sent(wanted, self.device)], wanted
        if self.split.pixels is not None:
            return torch.from_numpy(self.split.pixels[wanted]), wanted
        arrays, index = list[Pixels](), wanted.copy()
        for place, row in enumerate(wanted.tolist()):
            pixels, index[place] = self._read(row, unreadable, lambda at: self.split.still(at, self.image_size))
            arrays.append(pixels)
        return torch.from_numpy(np.stack(arrays)), index

    def _mix(self, epoch: int, positions: Indices, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup or cutmix with the neighbour. Returns images and each view's own share of the label, [B, 1]."""
        augment = self.augment
        u = draws.uniforms(self.seed, draws.MIX, epoch, positions // 2, 5)  # the same draws for both views of a pair
        cut = u[:, 1] < (0.5 if augment.mixup > 0 and augment.cutmix > 0 else float(augment.cutmix > 0))
        alpha = np.where(cut, augment.cutmix, augment.mixup)
        share = np.where(u[:, 0] < augment.mix_probability, betaincinv(alpha, alpha, u[:, 2]), 1.0)
        size = np.array(own.shape[-2:])
        half = np.sqrt(1 - share)[:, None] * size / 2
        centre = u[:, 3:5] * size
        low = np.clip(np.rint(centre - half), 0, size)
        high = np.clip(np.rint(centre + half), 0, size)
        share = np.where(cut, 1 - np.prod(high - low, axis=1) / np.prod(size), share)
        blend = np.where(cut, 1.0, share)
        corners = _sent(np.stack([low, high], 1), own.device)
        shares, blends, cuts = _sent(np.stack([share, blend, cut]), own.device).float()[:, :, None]
        box = _boxes(corners, *own.shape[-2:]) & (cuts[:, :, None, None] > 0)
        return torch.where(box, other, other.lerp(own, blends[:, :, None, None])), shares


def _sent(values: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Values copied from the host to where views are made; to a CUDA device asynchronously, from pinned memory."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def light_views(images: Tensor, augment: AugmentConfig, u: draws.Array) -> Tensor:
    """Shifts, zooms, rotates, flips and recolours a batch: one affine resampling with mirrored borders, then colour.

    Args:
        images: [B, 3, H, W] in 0..1.
        u: uniforms [B, 9].
    """
    draw = torch.from_numpy(2 * u - 1).float()  # -1..1
    mirror = torch.where(draw[:, 0] < 0, -1.0, 1.0) if augment.flip else torch.ones(len(draw))
    zoom = 1 + augment.zoom * draw[:, 1]
    angle = torch.deg2rad(augment.rotate * draw[:, 2])
    height, width = images.shape[-2:]
    shift = augment.shift * 2 * draw[:, 3:5]
    resampled = augment.zoom > 0 or augment.rotate > 0
    if not resampled:  # whole pixels, so that nothing is blurred
        size = torch.tensor([width, height])
        shift = (shift * size / 2).round() * 2 / size
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    right, down = -sin * (height / width), sin * (width / height)  # the grid is -1..1 on both axes: turns, not shears
    theta = torch.stack([cos * mirror, right, shift[:, 0], down * mirror, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(_sent(theta, images.device), list(images.shape), align_corners=False)
    mode = "bilinear" if resampled else "nearest"
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
    size = np.array(images.shape[-2:])
    area = (0.02 + u[:, 1] * (1 / 3 - 0.02)) * np.prod(size)
    aspect = np.exp((2 * u[:, 2] - 1) * np.log(10 / 3))
    sides = np.clip(np.rint(np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1)), 1, size - 1)
    low = np.floor(u[:, 3:5] * (size - sides + 1))
    for row in np.flatnonzero(u[:, 0] < probability):
        (top, left), (height, width) = low[row].astype(int), sides[row].astype(int)
        generator = torch.Generator().manual_seed(draws.scalar_seed(seed, draws.ERASE, epoch, int(index[row])))
        noise = torch.randn(3, height, width, generator=generator)
        noise = noise * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
        images[row, :, top : top + height, left : left + width] = noise


def _boxes(corners: Tensor, height: int, width: int) -> Tensor:
    """[B, 1, H, W] masks of boxes, given as [B, 2, 2] (low and high, row and column)."""

    def inside(axis: int, size: int) -> Tensor:
        steps = torch.arange(size, device=corners.device)
        return (steps >= corners[:, 0, axis, None]) & (steps < corners[:, 1, axis, None])

    return (inside(0, height)[:, :, None] & inside(1, width)[:, None, :])[:, None]


def _smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[B, K]: 1 - smoothing on the label, the rest spread over all classes."""
    target = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return target.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
