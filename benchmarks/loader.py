"""Training views per second against timm's loader, each in one process with one thread.

Photographs are scikit-learn's two sample images, cropped, scaled and mirrored at random to 500 x 375 pixels and saved
as JPEG at quality 90 (about 50 kB, as in ImageNet). Views are DeiT's at 224 pixels: random resized crop (bicubic),
flip, rand-m9-mstd0.5-inc1, erasing with probability 0.25. The peer is timm's `create_loader` with its prefetcher and
its defaults. Both sides normalise, keep freed memory, and have timm's posterize fixed, which fails on Pillow 13.

    files        every view decodes its file: ours without data.presize
    presized     ours with data.presize=288, as in the preset photos; the store exists already
    32 pixels    views as in the preset small-images without mixing (shift, flip, colours) of decoded 32-pixel images;
                 the peer's are torchvision's RandomCrop, RandomHorizontalFlip and ColorJitter in timm's loader

With a CUDA device also, of presized images,

    on the device       views that one process gathers and the device makes (data.views=device)
    the device's part   the same without gathering, which several loader processes do at the same time

The floor is the work that no such view can avoid: decode a file, resize a random crop to 224 pixels (bytes, by
torchvision), convert to floats; for a presized image the last two, for 32 pixels the last, for the device's part the
copy of the bytes and the last.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from benchmarks.table import Row, Setting, Table, machine
from coadvise.config.reading import load_config
from coadvise.config.schema import AugmentConfig
from coadvise.data.pipeline import IMAGENET_MEAN, IMAGENET_STD, allow_no_bits
from coadvise.data.scan import presized_split, scan_split
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources import Source, open_source
from coadvise.data.sources.folder import FolderSplit
from coadvise.data.views import Views
from coadvise.evaluation.speed import interleaved
from coadvise.machine import keep_freed_memory

BATCH_SIZE, BATCHES, SMALL_BATCHES = 64, 3, 30
CLASSES, GOAL = 4, 2.0


def photographs(folder: Path, count: int) -> Source:
    """A source of `count` training images, JPEGs of 500 x 375 pixels in class folders, and a validation image each."""
    from sklearn.datasets import load_sample_images  # here: it takes a second to import

    originals = [Image.fromarray(image) for image in load_sample_images().images]  # 640 x 427
    rng = np.random.default_rng(0)
    for number in range(count + CLASSES):
        image = originals[number % len(originals)]
        height = int(rng.integers(320, 428))
        width = height * 4 // 3
        left, top = int(rng.integers(0, 641 - width)), int(rng.integers(0, 428 - height))
        image = image.resize((500, 375), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = folder / ("train" if number < count else "val") / f"class{number % CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return open_source(folder)


class InMemory(list[tuple[Image.Image, int]]):
    """The peer's data set of decoded images and labels; its loader sets the transform."""

    transform: Callable[[Image.Image], Any]

    def __getitem__(self, number: Any) -> Any:
        image, label = super().__getitem__(number)
        return self.transform(image), label


def timm_loader(dataset: Any, size: int, batch_size: int, device: torch.device) -> Any:
    """timm's loader with DeiT's augmentation, in this process."""
    return create_loader(
        dataset, (3, size, size), batch_size, is_training=True, re_prob=0.25, re_mode="pixel", scale=(0.08, 1.0),
        color_jitter=None, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", mean=IMAGENET_MEAN,
        std=IMAGENET_STD, num_workers=0, pin_memory=False, persistent_workers=False, device=device,
    )  # fmt: skip


def one_epoch(views: Views, batch_size: int) -> Callable[[], None]:
    """All views of an epoch, normalised as the peer's are."""
    mean, std = (torch.tensor(values, device=views.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

    def call() -> None:
        for start in range(0, len(views), batch_size):
            views[0, np.arange(start, start + batch_size)].images.sub_(mean).div_(std)

    return call


def crops(images: Callable[[], Iterable[np.ndarray[Any, Any]]]) -> Callable[[], None]:
    """The floor of large images: a random crop of each [H, W, 3], resized, as floats."""
    crop = transforms.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC)

    def call() -> None:
        for image in images():
            crop(torch.from_numpy(image).permute(2, 0, 1)).float()

    return call


def on_device(presized: ScannedSplit, augment: AugmentConfig, batch_size: int, setting: Setting) -> dict[str, Any]:
    """Calls that make all views of presized images on the setting's device, its part of that, and the floor of it."""
    views = Views(presized, augment, CLASSES, 224, seed=0, on_device=True).on(setting.device)
    places = np.arange(len(views)).reshape(-1, batch_size)
    gathered = [views.gathered((0, some)) for some in places]
    gathered = [one.pin_memory() for one in gathered] if setting.device.type == "cuda" else gathered
    return {
        "on the device": one_epoch(views, batch_size),
        "the device's part": lambda: [views.finished(one) for one in gathered],
        "floor of the device's part": lambda: [
            one.singles.pixels.to(setting.device, non_blocking=True).float() for one in gathered
        ],
    }


def large(folder: Path, batch_size: int, setting: Setting) -> tuple[list[Row], str]:
    """Photographs on disk. The CPU decodes them; with a CUDA device that also makes views of presized ones."""
    count, presize = BATCHES * batch_size, load_config("photos").data.presize
    source, augment = photographs(folder / "photographs", count), AugmentConfig(kind="deit", erase=0.25)
    files = sorted(folder.glob("photographs/train/*/*.jpg"))
    times = [time.perf_counter()]
    for _ in ("made", "opened"):
        presized = presized_split(source, "train", presize, folder / "store", lambda text: None)
        times.append(time.perf_counter())
    making, opening = times[1] - times[0], times[2] - times[1]
    plain, store = scan_split(source.train, 224, in_memory=False), presized.presized
    assert store is not None
    peer = timm_loader(ImageDataset(str(folder / "photographs/train")), 224, batch_size, torch.device("cpu"))
    allow_no_bits(peer.loader.dataset.transform)
    calls: dict[str, Callable[[], object]] = {
        "timm": lambda: [None for _ in peer],
        "files": one_epoch(Views(plain, augment, CLASSES, 224, seed=0), batch_size),
        "presized": one_epoch(Views(presized, augment, CLASSES, 224, seed=0), batch_size),
        "floor of files": crops(lambda: (np.array(Image.open(path)) for path in files)),
        "floor of presized": crops(lambda: (np.array(store[row]) for row in range(count))),
    }
    if setting.device.type == "cuda":
        calls |= on_device(presized, augment, batch_size, setting)
    speed = {
        name: count / seconds for name, seconds in interleaved(calls, setting.repeats, setting.synchronise).items()
    }
    note = (
        f"the store of {presize} pixels: {store.path.stat().st_size / count / 1e3:.0f} kB per image, made at "
        f"{count / making:.0f} images/s (all cores), opened and checked again at {count / opening:.0f} images/s"
    )
    goals = {"files": 0.0, "presized": GOAL, "on the device": 0.0, "the device's part": 0.0}
    rows = [
        Row(name, "images/s", speed[name], speed["timm"], speed.get(f"floor of {name}"), goal)
        for name, goal in goals.items()
        if name in speed
    ]
    return rows, note


def small(setting: Setting, batch_size: int) -> Row:
    """Images of 32 pixels in memory; with a CUDA device they and their views are there."""
    config = load_config("small-images").augment
    augment = config.model_copy(update={"cutmix": 0.0, "smoothing": 0.0})
    count = SMALL_BATCHES * batch_size
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(count) % CLASSES
    split = ScannedSplit(FolderSplit(Path(), (), labels), labels, pixels, (), Counter({(32, 32): count}))
    images = (Image.fromarray(image.transpose(1, 2, 0)) for image in pixels)
    peer = timm_loader(InMemory(zip(images, labels.tolist(), strict=True)), 32, batch_size, setting.device)
    peer.loader.dataset.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=round(augment.shift * 32), padding_mode="symmetric"),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(augment.colour, augment.colour, augment.colour),
            lambda image: np.array(image).transpose(2, 0, 1),
        ]
    )
    peer.random_erasing = None
    stored = torch.from_numpy(pixels).to(setting.device)
    calls: dict[str, Callable[[], object]] = {
        "peer": lambda: [None for _ in peer],
        "ours": one_epoch(Views(split, augment, CLASSES, 32, seed=0).on(setting.device), batch_size),
        "floor": lambda: [batch.float() for batch in stored.split(batch_size)],
    }
    speed = {name: count / time for name, time in interleaved(calls, setting.repeats, setting.synchronise).items()}
    return Row("32 pixels", "images/s", speed["ours"], speed["peer"], speed["floor"], GOAL)


def run(setting: Setting) -> Table:
    batch_size, threads = setting.batch_size or BATCH_SIZE, torch.get_num_threads()
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows, note = large(Path(folder), batch_size, setting)
            rows.append(small(setting, batch_size))
            about = {**machine(setting), "batch": batch_size, "workers": 0, "layout": "contiguous"}
    finally:
        torch.set_num_threads(threads)
    return Table("training views of one process and thread against timm's loader", "timm", rows, about, [note])
