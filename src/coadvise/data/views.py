"""Views: images as a training step sees them, each a pure function of (seed, epoch, position).

An epoch is an order of all training images, a function of (seed, epoch). How an image is augmented, and with which
other it is mixed, is a function of (seed, epoch, image) and (seed, epoch, position) alone, so views do not depend on
batches, workers, processes or resuming. Images are mixed with neighbours in the order, mostly within a batch.

Random numbers are drawn on the CPU and applied where the pixels are: on the CUDA device if all images are in memory and
fit there, or if DeiT's views are asked for there (`device_views.py`). That gives the same views up to the device's
rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from coadvise.config.schema import AugmentConfig, ImageSize, sides
from coadvise.data import draws
from coadvise.data.balance import balanced_order
from coadvise.data.device_ops import sent
from coadvise.data.device_views import Singles, made, singles_of
from coadvise.data.erasing import Patch, erase_, patches
from coadvise.data.images import DecodedImage, Pixels, UnreadableImageError
from coadvise.data.order import WindowedOrder
from coadvise.data.pipeline import Pipeline
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


@dataclass(frozen=True)
class Gathered:
    """A batch as a loader process hands it over where a device makes its views.

    Attributes:
        epoch, places: of the request.
        singles: each different view before mixing, made or as what a device makes it of.
        index: [B], the row of each one's image.
        where: which of them the views at `places` are; None where nothing is mixed.
        unreadable: see `Batch`.
    """

    epoch: int
    places: Indices
    singles: Tensor | Singles
    index: Indices
    where: Indices | None
    unreadable: Mapping[int, str]

    def pin_memory(self) -> "Gathered":
        """Called by PyTorch's loader."""
        return replace(self, singles=self.singles.pin_memory())


class Views(TorchDataset[Batch]):
    """Training views of a split, indexed by a request, or by (epoch, positions in that epoch's order).

    An image that can no longer be read is replaced by the next in the split that can: that image's own view of the
    epoch, with its own label and index.

    Args:
        on_device: make DeiT's views of presized images in batches, where `on` says.
    """

    def __init__(
        self,
        split: ScannedSplit,
        augment: AugmentConfig,
        classes: int,
        image_size: ImageSize,
        seed: int,
        weights: Sequence[float] | None = None,
        on_device: bool = False,
    ) -> None:
        self.split, self.augment, self.classes, self.image_size, self.seed = split, augment, classes, image_size, seed
        self.weights = weights  # how often each class is shown; None: every image once an epoch
        self._resident: Tensor | None = None  # all pixels, on the device that makes the views
        self.device = torch.device("cpu")  # where views are made, and batches are
        self._order: tuple[int, Indices] = (-1, np.empty(0, np.int64))
        windows = split.split.windows()
        self._windows = None if windows is None else WindowedOrder(seed, *windows)
        self._soon = (-1, -1)  # epoch and window whose shards are fetched
        self._pipeline = Pipeline(augment, image_size, split.fit) if augment.kind == "deit" else None
        # Whether loader processes only gather what a device then makes views of; see `finished`.
        self.made_apart = on_device and self._pipeline is not None and split.presized is not None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def uses_workers(self) -> bool:
        """Whether loader processes can make batches, or what a device makes them of."""
        return self._resident is None

    def on(self, device: torch.device) -> "Views":
        """The same views made on a device.

        Of images in memory on a CUDA device, if they fit in a quarter of its free memory; of presized ones if
        `on_device` is set, on any.
        """
        pixels = self.split.pixels
        if self.made_apart:
            return self._placed(device)
        if device.type != "cuda" or pixels is None or self._pipeline is not None:
            return self
        return self.resident(device) if pixels.nbytes <= torch.cuda.mem_get_info(device)[0] // 4 else self

    def resident(self, device: torch.device) -> "Views":
        """The same views made on any device, from a copy of all pixels there."""
        views = self._placed(device)
        views._resident = torch.from_numpy(self.split.pixels).to(device)
        return views

    def _placed(self, device: torch.device) -> "Views":
        views = copy(self)
        views.device = device
        return views

    def drawn(self, epoch: int) -> int:
        """The epoch whose order and views an epoch uses: itself, or an earlier one where views are recycled."""
        return epoch % self.augment.recycle if self.augment.recycle else epoch

    def order(self, epoch: int) -> Indices:
        """The rows of the images in an epoch's order, [N]: each once, or by the weights of their classes."""
        return self.rows(epoch, np.arange(len(self)))

    def rows(self, epoch: int, places: Indices) -> Indices:
        """The rows at some places of an epoch's order. Of very many images, or of shards, no whole order is held."""
        epoch = self.drawn(epoch)
        if self.weights is None and self._windows is not None and self._windows.windows > 1:
            return self._windows.rows(epoch, places)
        if self.weights is None and len(self) > draws.LARGE:
            return draws.shuffled(self.seed, draws.ORDER, epoch, len(self), places)
        if self._order[0] != epoch:
            if self.weights is None:
                order = draws.permutation(self.seed, draws.ORDER, epoch, len(self))
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
        return Request(epoch, places, self.rows(epoch, places))

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
        return self.finished(self.gathered(request))

    def gathered(self, request: Request | tuple[int, Indices]) -> Gathered:
        """What there is of a batch before the device's part, if that makes its views."""
        epoch, places, rows = request if isinstance(request, Request) else self.request(*request)
        unreadable: dict[int, str] = {}
        if not self._mixing:
            return Gathered(epoch, places, *self._single_views(epoch, rows, unreadable), None, unreadable)
        _, first, where = np.unique(places, return_index=True, return_inverse=True)
        return Gathered(epoch, places, *self._single_views(epoch, rows[first], unreadable), where, unreadable)

    def finished(self, gathered: Gathered) -> Batch:
        """The batch, on the device where views are made."""
        singles, index, where, augment = gathered.singles, gathered.index, gathered.where, self.augment
        images = singles if isinstance(singles, Tensor) else made(singles, sides(self.image_size), self.device)
        if where is not None:
            own, other = sent(where, images.device).chunk(2)
            index, partner = np.split(index[where], 2)
            positions = gathered.places[: len(gathered.places) // 2]
            images, share = self._mix(gathered.epoch, positions, images[own], images[other])
        labels = self._labels(index)
        if where is not None or augment.smoothing > 0:
            target = _smooth(labels, self.classes, augment.smoothing)
            if where is not None:
                other_target = _smooth(self._labels(partner), self.classes, augment.smoothing)
                target = share * target + (1 - share) * other_target
            labels = target
        return Batch(images, labels, torch.from_numpy(index), gathered.epoch, gathered.unreadable)

    def _single_views(
        self, epoch: int, wanted: Indices, unreadable: dict[int, str]
    ) -> tuple[Tensor | Singles, Indices]:
        """[B, 3, H, W] in 0..1, before mixing, or what a device makes them of; and the row of each view's image."""
        if self._reads and len(wanted):
            self.split.split.bring(wanted, partial(mark_reading, int(wanted[0])))
        if self._pipeline is not None:
            shown = list[int]()
            seen = self._seen(self._pipeline, epoch, wanted, unreadable, shown)
            if self.made_apart:
                drawn = self._pipeline.drawn(cast(Iterator[tuple[Pixels, int]], seen))
                index = np.array(shown, np.int64)
                return singles_of(drawn, self._erased(epoch, index)), index
            images = self._pipeline.views(seen, len(wanted))
            index = np.array(shown, np.int64)
        else:
            pixels, index = self._pixels(wanted, unreadable)
            images = pixels.float().div_(255)
        if self.augment.kind == "light":
            images = light_views(images, self.augment, draws.uniforms(self.seed, draws.GEOMETRY, epoch, index, 9))
        for patch in self._erased(epoch, index):
            erase_(images, patch)
        return images, index

    def _erased(self, epoch: int, index: Indices) -> Iterable[Patch]:
        erase = self.augment.erase
        return patches(sides(self.image_size), erase, self.seed, epoch, index) if erase > 0 else ()

    def _labels(self, index: Indices) -> Tensor:
        return sent(self.split.labels[index], self.device)

    def _seen(
        self, pipeline: Pipeline, epoch: int, wanted: Indices, unreadable: dict[int, str], shown: list[int]
    ) -> Iterator[tuple[DecodedImage | Pixels, int]]:
        """Images of any size, read one at a time, and the seed of each one's view. Adds the row of each to `shown`."""
        presized = self.split.presized

        def look(row: int) -> tuple[DecodedImage | Pixels, int]:
            seed = draws.scalar_seed(self.seed, draws.PIPELINE, epoch, row)
            return self.split.decoded(row, pipeline.need(seed)) if presized is None else presized[row], seed

        for row in wanted.tolist():
            seen, at = self._read(row, unreadable, look)
            shown.append(at)
            yield seen

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
            return self._resident[sent(wanted, self.device)], wanted
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
        corners = sent(np.stack([low, high], 1), own.device)
        shares, blends, cuts = sent(np.stack([share, blend, cut]), own.device).float()[:, :, None]
        box = _boxes(corners, *own.shape[-2:]) & (cuts[:, :, None, None] > 0)
        return torch.where(box, other, other.lerp(own, blends[:, :, None, None])), shares


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
    grid = F.affine_grid(sent(theta, images.device), list(images.shape), align_corners=False)
    mode = "bilinear" if resampled else "nearest"
    images = F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)
    if augment.colour > 0:
        factors = sent(1 + augment.colour * draw[:, 5:8], images.device)
        brightness, contrast, saturation = factors.T[:, :, None, None, None]
        images = images * brightness
        images = images.mean((1, 2, 3), keepdim=True).lerp(images, contrast)
        images = images.mean(1, keepdim=True).lerp(images, saturation).clamp_(0, 1)
    return images


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
