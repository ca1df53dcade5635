"""Training views a second against timm's loader, each in one process with one thread: what a core makes.

Photographs are scikit-learn's two sample images, cut, scaled and mirrored at random to 500 x 375 pixels and saved as
JPEG at quality 90 (about 50 kB, as ImageNet's). Views are DeiT's at 224 pixels: random resized crop (bicubic), flip,
rand-m9-mstd0.5-inc1, erasing with probability 0.25. The peer is timm's `create_loader` with its prefetcher and its
defaults; both sides also normalise. timm's posterize is mended on both sides, since it stops on Pillow 13. Freed memory
is kept, as in every process that makes views for a run; the peer gains from that too.

    files        every view decodes its file: ours without data.presize
    presized     ours with data.presize=288, as in the preset photos; the store was made before
    32 pixels    views as in the preset small-images without mixing (shift, flip, colours) of 32-pixel images that both
                 sides hold decoded in memory; the peer's are torchvision's RandomCrop with reflected borders,
                 RandomHorizontalFlip and ColorJitter, handed out by timm's loader

The floor is what no such view can do without, measured in the same turns: a file decoded, a random crop resized to 224
pixels (bytes, by torchvision), bytes made floats; of a presized image the last two, of 32 pixels the last.
"""

import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from torchvision.transforms import (
    ColorJitter,
    Compose,
    InterpolationMode,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
)

from benchmarks.table import Row, Setting, Table, machine
from coadvise.config import AugmentConfig, load_config
from coadvise.data.pipeline import IMAGENET_MEAN, IMAGENET_STD, allow_no_bits
from coadvise.data.scan import ScannedSplit, presized_split, scan_split
from coadvise.data.sources import Source
from coadvise.data.sources.folder import FolderSplit
from coadvise.data.views import Views
from coadvise.evaluation.speed import interleaved
from coadvise.machine import keep_freed_memory

BATCH_SIZE, BATCHES, SMALL_BATCHES = 64, 3, 30
CLASSES = 4
GOAL = 2.0


def photographs(folder: Path, count: int) -> Source:
    """Writes JPEGs of 500 x 375 pixels into folders of classes."""
    from sklearn.datasets import load_sample_images  # here: it takes a second to import

    originals = [Image.fromarray(image) for image in load_sample_images().images]  # 640 x 427
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        image = originals[number % len(originals)]
        height = int(rng.integers(320, 428))
        width = height * 4 // 3
        left, top = int(rng.integers(0, 641 - width)), int(rng.integers(0, 428 - height))
        image = image.resize((500, 375), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        paths.append(f"class{number % CLASSES}/{number:05d}.jpg")
        (folder / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / paths[-1], quality=90)
    split = FolderSplit(folder, tuple(paths), np.arange(count) % CLASSES)
    return Source(str(folder), tuple(f"class{n}" for n in range(CLASSES)), split, split, "")


class InMemory(torch.utils.data.Dataset[Any]):
    """The peer's data set of small images: Pillow images, decoded before."""

    def __init__(self, split: ScannedSplit) -> None:
        assert split.pixels is not None
        self.images = [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in split.pixels]
        self.labels = split.labels.tolist()
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        assert self.transform is not None
        return self.transform(self.images[number]), self.labels[number]


def timm_loader(dataset: Any, size: int, batch_size: int, device: torch.device) -> Any:
    """timm's loader with DeiT's augmentation, in this process."""
    return create_loader(
        dataset, (3, size, size), batch_size, is_training=True, re_prob=0.25, re_mode="pixel", scale=(0.08, 1.0),
        color_jitter=None, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", mean=IMAGENET_MEAN,
        std=IMAGENET_STD, num_workers=0, pin_memory=False, persistent_workers=False, device=device,
    )  # fmt: skip


def one_pass(views: Views, batch_size: int) -> Callable[[], None]:
    """All views of an epoch, normalised as the peer's are."""
    mean, std = (torch.tensor(values, device=views.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

    def call() -> None:
        for start in range(0, len(views), batch_size):
            views[0, np.arange(start, start + batch_size)].images.sub_(mean).div_(std)

    return call


def exhaust(loader: Any) -> Callable[[], None]:
    def call() -> None:
        for _ in loader:
            pass

    return call


def cropped(images: Callable[[], Iterable[np.ndarray[Any, Any]]]) -> Callable[[], None]:
    """The floor of large images: a crop of each [H, W, 3], resized, as floats."""
    crop = RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC)

    def call() -> None:
        for image in images():
            crop(torch.from_numpy(image).permute(2, 0, 1)).float()

    return call


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def large(folder: Path, batch_size: int, repeats: int) -> tuple[list[Row], str]:
    """Photographs on disk, on the CPU whatever the device: there they are decoded."""
    count, presize = BATCHES * batch_size, load_config("photos").data.presize
    source = photographs(folder / "photographs", count)
    augment = AugmentConfig(kind="deit", erase=0.25)
    began = time.perf_counter()
    kept = presized_split(source, "train", presize, folder / "store", lambda text: None)
    made = time.perf_counter()
    kept = presized_split(source, "train", presize, folder / "store", lambda text: None)
    opened = time.perf_counter()
    plain = scan_split(source.train, 224, in_memory=False)
    peer = timm_loader(ImageDataset(source.where), 224, batch_size, torch.device("cpu"))
    allow_no_bits(peer.loader.dataset.transform)
    store = kept.presized
    assert store is not None
    seconds = interleaved(
        {
            "timm": exhaust(peer),
            "files": one_pass(Views(plain, augment, CLASSES, 224, seed=0), batch_size),
            "presized": one_pass(Views(kept, augment, CLASSES, 224, seed=0), batch_size),
            "floor of files": cropped(
                lambda: (np.array(Image.open(io.BytesIO(source.train.read(row)))) for row in range(count))
            ),
            "floor of presized": cropped(lambda: (np.array(store[row]) for row in range(count))),
        },
        repeats,
        synchronise=lambda: None,
    )
    rows = [
        Row(name, "images/s", count / seconds[name], count / seconds["timm"], count / seconds[f"floor of {name}"], goal)
        for name, goal in (("files", 0.0), ("presized", GOAL))
    ]
    size = store.path.stat().st_size / count
    note = (
        f"the store of {presize} pixels: {size / 1e3:.0f} kB an image, made at {count / (made - began):.0f} images/s "
        f"(all cores), opened and checked again at {count / (opened - made):.0f} images/s"
    )
    return rows, note


def small(setting: Setting, batch_size: int) -> Row:
    """Images of 32 pixels in memory: on a CUDA device they and their views are there."""
    config = load_config("small-images").augment
    augment = config.model_copy(update={"cutmix": 0.0, "smoothing": 0.0})
    count = SMALL_BATCHES * batch_size
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(count) % CLASSES
    split = ScannedSplit(FolderSplit(Path(), (), labels), labels, pixels, (), Counter({(32, 32): count}))
    dataset = InMemory(split)
    peer = timm_loader(dataset, 32, batch_size, setting.device)
    peer.loader.dataset.transform = Compose(
        [
            RandomCrop(32, padding=round(augment.shift * 32), padding_mode="symmetric"),
            RandomHorizontalFlip(),
            ColorJitter(augment.colour, augment.colour, augment.colour),
            lambda image: np.array(image).transpose(2, 0, 1),
        ]
    )
    peer.random_erasing = None
    views = Views(split, augment, CLASSES, 32, seed=0).on(setting.device)
    stored = torch.from_numpy(pixels).to(setting.device)
    calls: dict[str, Callable[[], object]] = {
        "peer": exhaust(peer),
        "ours": one_pass(views, batch_size),
        "floor": lambda: [batch.float() for batch in stored.split(batch_size)],
    }
    speed = {name: count / time for name, time in interleaved(calls, setting.repeats, setting.synchronise).items()}
    return Row("32 pixels", "images/s", speed["ours"], speed["peer"], speed["floor"], GOAL)


def run(setting: Setting) -> Table:
    batch_size = setting.batch_size or BATCH_SIZE
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, one_thread():
        rows, note = large(Path(folder), batch_size, setting.repeats)
        rows.append(small(setting, batch_size))
        about = {**machine(setting), "batch": batch_size, "workers": 0, "layout": "contiguous"}
    return Table("training views of one process and thread against timm's loader", "timm", rows, about, [note])
