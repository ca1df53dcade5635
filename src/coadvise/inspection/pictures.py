"""One pass over all files: what their headers say, what they look like, and which cannot be read."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from coadvise.data.decoding import threaded
from coadvise.data.images import Pixels, UnreadableImageError, decode, decode_image, fault, open_image
from coadvise.data.sources import Source, Split
from coadvise.errors import UserError
from coadvise.inspection.features import Floats, cheap_features
from coadvise.inspection.suspects import NEEDED

LOOK = 16  # pixels, square: the small copy by which candidates for near duplicates are compared
SLICE = 256  # pictures at a time
_REDUCED = 256  # pixels; a hash of 64 bits needs no more


@dataclass(frozen=True)
class Place:
    """Where a picture stands in the data."""

    split: str
    row: int
    name: str
    label: int


@dataclass(frozen=True)
class Header:
    """What a file says of its picture; `bits` a channel, `shape` is (width, height)."""

    format: str
    mode: str
    bits: int
    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Pictures:
    """All readable pictures of a source, train first, and the others.

    Attributes:
        places, headers, digests: one each a readable picture; a digest is of the file's bytes.
        hashes: [N] uint64, perceptual hashes.
        looks: [N, LOOK, LOOK, 3] uint8, small copies.
        features: [N, D] float32 for each way in which pictures are described.
        unreadable: each place with a line: its name and why.
    """

    source: Source
    places: tuple[Place, ...]
    headers: tuple[Header, ...]
    digests: tuple[str, ...]
    hashes: npt.NDArray[np.uint64]
    looks: Pixels
    features: tuple[Floats, ...]
    unreadable: tuple[tuple[Place, str], ...]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.array([place.label for place in self.places], np.int64)

    def read(self, number: int) -> bytes:
        """A picture's encoded bytes. Raises OSError."""
        place = self.places[number]
        return self.source.splits[place.split].read(place.row)


@dataclass(frozen=True)
class _Seen:
    header: Header
    digest: str
    hash: bytes
    look: Pixels


def look_through(
    source: Source,
    network: Callable[[Pixels], Sequence[Floats]] | None,
    pixels: Callable[[Image.Image], Pixels] | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pictures:
    """Reads and decodes every file once, in threads.

    Args:
        network: maps images [B, 3, H, W] uint8 to features [B, D], one array a network; None: cheap features.
        pixels: makes such an image [3, H, W].

    Raises:
        UserError: no picture can be read, or the package imagehash is missing.
    """
    _imagehash()
    seen: list[_Seen] = []
    places: list[Place] = []
    unreadable: list[tuple[Place, str]] = []
    described: list[Sequence[Floats]] = []
    splits = source.splits
    total, done = sum(map(len, splits.values())), 0
    for name, split in splits.items():
        labels = split.labels.tolist()
        outcomes = threaded(partial(_look_at, split, pixels or cheap_features), range(len(split)))
        for start in range(0, len(split), SLICE):
            some = list(islice(outcomes, SLICE))
            shown = []
            for row, outcome in enumerate(some, start):
                place = Place(name, row, split.name(row), labels[row])
                if isinstance(outcome, str):
                    unreadable.append((place, outcome))
                    continue
                places.append(place)
                seen.append(outcome[0])
                shown.append(outcome[1])
            if shown:
                stack = np.stack(shown)
                described.append([stack] if network is None else network(stack))
            done += len(some)
            progress(done, total)
    if not places:
        raise UserError(f"none of the {total} images of '{source.where}' can be read; the first: {unreadable[0][1]}")
    return Pictures(
        source,
        tuple(places),
        tuple(one.header for one in seen),
        tuple(one.digest for one in seen),
        np.frombuffer(b"".join(one.hash for one in seen), np.uint64),
        np.stack([one.look for one in seen]),
        tuple(np.concatenate(parts) for parts in zip(*described, strict=True)),
        tuple(unreadable),
    )


def _look_at(split: Split, describe: Callable[[Image.Image], Any], row: int) -> tuple[_Seen, Any] | str:
    """What is found of a picture, and its description; or why it cannot be read."""
    name = split.name(row)
    try:
        content = split.read(row)
        with open_image(content) as opened:
            header = Header(opened.format or "", opened.mode, _bits(opened), opened.size)
    except Exception as error:  # Pillow's readers raise many types
        return fault(name, error)
    try:
        image, _, span = decode_image(content, name)
        if span is not None:  # the values of all pictures are not known yet; what is alike has the same ones
            image = decode(content, name, values=span)
    except UnreadableImageError as error:
        return str(error)
    shown = describe(image)
    digest = hashlib.sha256(content).hexdigest()[:16]
    image.thumbnail((_REDUCED, _REDUCED), reducing_gap=2)
    look = np.asarray(image.resize((LOOK, LOOK), Image.Resampling.BICUBIC))
    bits = _imagehash().phash(image).hash
    return _Seen(header, digest, np.packbits(bits).tobytes(), look), shown


def _bits(image: Image.Image) -> int:
    """Bits a channel in the file; Pillow decodes colours of 16 bits to 8."""
    if image.mode in ("I", "F"):
        return 32
    if image.mode == "1":
        return 1
    raw = str(image.tile[0][3]) if isinstance(image, PngImageFile) and image.tile else image.mode
    return 16 if "16" in raw else 8


def _imagehash() -> Any:
    try:
        import imagehash
    except ImportError:
        raise UserError(NEEDED) from None
    return imagehash
