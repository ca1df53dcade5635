"""Batches in order: training views from any step on, and the images to score."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from coadvise.config.schema import ImageSize
from coadvise.data.images import Pixels, UnreadableImageError
from coadvise.data.scanned import ScannedSplit
from coadvise.data.views import Batch, Gathered, Request, Views
from coadvise.data.workers import mark_reading, worker_batches
from coadvise.errors import UserError

Change = Callable[[Pixels, int], Pixels]


class TrainingLoader:
    """Micro-batches of training views for one process.

    A step takes `batch_size` consecutive positions of the epoch's order, divided into accumulate x processes chunks.
    Images that do not fill the last batch of an epoch are left out of it; a set smaller than a batch is one batch.

    Args:
        batch_size: images an optimiser step, over all processes and micro-batches.
        rank, processes: which share of each step this process gets.
        pin: put batches made on the CPU into pinned memory, from which a CUDA device copies asynchronously.

    Raises:
        UserError: a batch cannot be divided evenly.
    """

    def __init__(
        self, views: Views, batch_size: int, accumulate: int = 1, workers: int = 0, rank: int = 0, processes: int = 1,
        pin: bool = False,
    ) -> None:  # fmt: skip
        self.batch_size = whole_batch(batch_size, len(views), accumulate, processes)
        self.views, self.accumulate, self.workers, self.pin = views, accumulate, workers, pin
        self.rank, self.processes = rank, processes
        self.steps_per_epoch = len(views) // self.batch_size

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of steps first..last-1, `accumulate` a step, whichever steps ran here before."""
        ahead = 4 if self.workers and self.views.uses_workers else None
        batches = _batches(self.views, self.workers, self.pin, _Requests(self, first, last), prefetch_factor=ahead)
        for _ in range(first, last):
            yield [next(batches) for _ in range(self.accumulate)]


def whole_batch(batch_size: int, images: int, accumulate: int, processes: int) -> int:
    """The images of an optimiser step: `batch_size`, or with fewer images, as many as can be divided evenly.

    Raises:
        UserError: a batch cannot be divided evenly.
    """
    chunks = accumulate * processes
    size = min(batch_size, images - images % chunks)
    if size == 0 or size % chunks:
        raise UserError(
            f"a batch of {size} images cannot be divided into {accumulate} micro-batches on {processes} processes; "
            f"choose recipe.batch_size a multiple of {chunks}, at most the {images} training images"
        )
    return size


class _Requests:
    """The requests to `Views`, in order, one a micro-batch."""

    def __init__(self, loader: TrainingLoader, first: int, last: int) -> None:
        self.loader, self.first, self.last = loader, first, last

    def __len__(self) -> int:
        return (self.last - self.first) * self.loader.accumulate

    def __iter__(self) -> Iterator[Request]:
        own = self.loader
        for step in range(self.first, self.last):
            epoch, within = divmod(step, own.steps_per_epoch)
            positions = np.arange(within * own.batch_size, (within + 1) * own.batch_size)
            chunks = np.split(positions, own.accumulate * own.processes)
            yield from (own.views.request(epoch, chunk) for chunk in chunks[own.rank :: own.processes])


def epoch_batches(views: Views, epoch: int, batch_size: int, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
    """All views of an epoch, in its order."""
    positions = np.arange(len(views))
    starts = range(0, len(views), batch_size)
    requests = [views.request(epoch, positions[start : start + batch_size]) for start in starts]
    return _batches(views, workers, pin, requests)


def _batches(views: Views, workers: int, pin: bool, requests: Iterable[Request], **options: Any) -> Iterator[Batch]:
    """The batches of some requests. Loader processes and pinning are of no use to views of images on a device."""
    workers, pin = (workers, pin) if views.uses_workers else (0, False)
    source = _Gathering(views) if views.made_apart else views
    for made in worker_batches(source, workers, views.split.name, sampler=requests, pin_memory=pin, **options):
        yield views.finished(made) if views.made_apart else made


class _Gathering(Dataset[Gathered]):
    """What loader processes do where a device makes the views."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, request: Request) -> Gathered:
        return self.views.gathered(request)


class _StillImages(Dataset[Tensor]):
    """Images as networks are scored on them: fitted to their size, nothing random, then `change`d."""

    def __init__(self, split: ScannedSplit, image_size: ImageSize, batch_size: int, change: Change | None) -> None:
        self.split, self.image_size, self.batch_size, self.change = split, image_size, batch_size, change

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, number: int) -> Tensor:
        rows = range(len(self.split))[number * self.batch_size : (number + 1) * self.batch_size]
        if self.split.pixels is not None:
            stack = self.split.pixels[rows.start : rows.stop]
        else:
            self.split.split.bring(np.arange(rows.start, rows.stop), partial(mark_reading, rows.start))
            stack = np.stack([self._read(i) for i in rows])
        if self.change is not None:
            stack = np.stack([self.change(pixels, row) for pixels, row in zip(stack, rows, strict=True)])
        return torch.from_numpy(stack).float().div_(255)

    def _read(self, row: int) -> Pixels:
        mark_reading(row)
        try:
            return self.split.still(row, self.image_size)
        except UnreadableImageError as error:
            raise UserError(
                f"an image to be scored can no longer be read: {error}; none is scored in its place"
            ) from None


def still_batches(
    split: ScannedSplit, image_size: ImageSize, batch_size: int = 250, workers: int = 0, change: Change | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Validation images [B, 3, H, W] float32 in 0..1, all of them, in the split's order.

    Args:
        change: maps an image [3, H, W] uint8 and its row in the split to the image to score in its place.
        numbers: which batches to make, counted from 0; None makes all.

    Raises:
        UserError: a picture can no longer be read.
    """
    images = _StillImages(split, image_size, batch_size, change)
    return worker_batches(images, workers, split.name, sampler=range(len(images)) if numbers is None else numbers)
