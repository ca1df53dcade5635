"""Large JPEGs decoded at a reduced size against decoding them whole, in one process with one thread.

The photographs have 6016 x 4016 pixels: scikit-learn's two sample images, enlarged, with noise as a camera's grain,
saved as a camera does at its normal (quality 92, 6 MB) and at its finest setting (quality 95 and more grain, 11 MB).

    still 224       resized until the shorter side has 224 pixels, cropped at the centre: what networks are scored on
    still 224, fine the same of the larger files
    presized 288    what `data.presize=288` keeps of a training picture
    view 224        random resized crops of 224 pixels from files, as DeiT's views begin (data.presize=0)

The peer is Pillow, which decodes all pixels and then does the same with them: open, convert, resize by bicubic
interpolation, crop; for views it is our pipeline behind Pillow. Both read from memory. The floor is what no reduced
JPEG avoids: its entropy decoding, as Pillow does it at an eighth of the size.

The note gives the mean and largest difference between both sides' pixels, in grey levels of 255.
"""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from benchmarks.table import Row, Setting, Table, machine
from coadvise.config.schema import AugmentConfig
from coadvise.data.images import DecodedImage, Pixels, decode, decode_image, fitted, fitted_size, to_array
from coadvise.data.pipeline import Pipeline
from coadvise.data.store import presized, presized_size
from coadvise.evaluation.speed import interleaved

SIZE = (6016, 4016)
PIXELS, PRESIZED = 224, 288
NORMAL, FINE = (4.0, 92), (8.0, 95)  # standard deviation of the grain in grey levels, JPEG quality
GOALS = {"still 224": 4.0, "presized 288": 4.0}
SEEDS = 8  # views of each photograph


def photographs(grain: float, quality: int) -> list[bytes]:
    """Two photographs as JPEG files."""
    from sklearn.datasets import load_sample_images  # here: it takes a second to import

    rng, files = np.random.default_rng(0), []
    for original in load_sample_images().images:
        pixels = np.asarray(Image.fromarray(original).resize(SIZE, Image.Resampling.BICUBIC), np.float32)
        noise = rng.standard_normal(pixels.shape[:2], np.float32)[..., None] * grain
        file = io.BytesIO()
        Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def whole(content: bytes) -> Image.Image:
    """All pixels of a file, by Pillow alone."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def as_it_is(image: Image.Image) -> DecodedImage:
    return DecodedImage(image, image.size)


def pillow_still(content: bytes) -> Pixels:
    image = whole(content)
    scale = PIXELS / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - PIXELS) // 2, (image.height - PIXELS) // 2
    return to_array(image.crop((left, top, left + PIXELS, top + PIXELS)))


def our_still(content: bytes) -> Pixels:
    return to_array(fitted(decode(content, "", partial(fitted_size, size=PIXELS, fit="crop")), PIXELS))


def our_presized(content: bytes) -> Pixels:
    return presized(decode(content, "", lambda *size: presized_size(size, PRESIZED)), PRESIZED)


def entropy(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (1, 1))
        image.load()


def views(pipeline: Pipeline, files: list[bytes], see: Callable[[bytes, int], DecodedImage]) -> torch.Tensor:
    """Views of each file with each seed."""
    pairs = [(content, seed) for content in files for seed in range(SEEDS)]
    return pipeline.views(((see(content, seed), seed) for content, seed in pairs), len(pairs))


def run(setting: Setting) -> Table:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        normal, fine = photographs(*NORMAL), photographs(*FINE)
        pipeline = Pipeline(AugmentConfig(kind="deit", rand_augment=""), PIXELS)
        cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "still 224": (lambda: [*map(pillow_still, normal)], lambda: [*map(our_still, normal)]),
            "still 224, fine": (lambda: [*map(pillow_still, fine)], lambda: [*map(our_still, fine)]),
            "presized 288": (
                lambda: [presized(whole(content), PRESIZED) for content in normal],
                lambda: [*map(our_presized, normal)],
            ),
            "view 224": (
                lambda: views(
                    pipeline, normal, lambda content, seed: DecodedImage(image := whole(content), image.size)
                ),
                lambda: views(pipeline, normal, lambda content, seed: decode_image(content, "", pipeline.need(seed))),
            ),
        }
        calls = {f"{side} {name}": call for name, pair in cases.items() for side, call in zip("po", pair, strict=True)}
        calls["f normal"], calls["f fine"] = (lambda: [*map(entropy, normal)]), (lambda: [*map(entropy, fine)])
        seconds = interleaved(calls, setting.repeats, lambda: None)
        differences = [
            f"{name}: {np.abs(change).mean():.2f} mean, {np.abs(change).max():.0f} at most"
            for name, pair in cases.items()
            for change in [_levels(pair[1]()) - _levels(pair[0]())]
        ]
        about = {**machine(setting), "pixels": f"{SIZE[0]} x {SIZE[1]}"}
    finally:
        torch.set_num_threads(threads)
    rows = []
    for name in cases:
        images = len(normal) * (SEEDS if name.startswith("view") else 1)
        floor = seconds["f fine" if "fine" in name else "f normal"] / len(normal)
        ours, peer = (1000 * seconds[f"{side} {name}"] / images for side in "op")
        rows.append(Row(name, "ms", ours, peer, 1000 * floor, GOALS.get(name, 0.0)))
    sizes = [f"{sum(map(len, files)) / len(files) / 1e6:.1f} MB" for files in (normal, fine)]
    notes = [f"files of {sizes[0]}, fine {sizes[1]}; difference in grey levels:", *differences]
    return Table("large JPEGs at a reduced size against decoding them whole", "Pillow", rows, about, notes)


def _levels(images: object) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    found = images * 255 if isinstance(images, torch.Tensor) else np.stack(images)  # type: ignore[call-overload]
    return np.asarray(found, np.float64)
