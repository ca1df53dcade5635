"""Pictures of a split, decoded in threads, or looked at by their headers, some rows at a time."""

import contextlib
import io
import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
from PIL import Image

from coadvise.config.schema import Fit, ImageSize
from coadvise.data.images import (
    ENDS,
    DecodedImage,
    Need,
    Pixels,
    UnreadableImageError,
    UnreadNowError,
    Values,
    decode_image,
    digest_of,
    first_bits,
    fitted,
    fitted_size,
    is_whole,
    open_image,
    to_array,
    unreadable,
    upright_size,
)
from coadvise.data.sources.split import Labels, Split
from coadvise.data.store import Decoded, Outcome, Seen, UnreadNow
from coadvise.machine import available_cores

T = TypeVar("T")
MANY = 20_000  # pictures whose headers are worth several processes


@dataclass(frozen=True)
class Keep:
    """What is kept of each image: an array.

    Attributes:
        make: gives it.
        need: what `make` resizes a picture to.
        values: see `ScannedSplit`.
        wide: whether pictures of more than 8 bits are kept; they cannot be while their `values` are looked for.
    """

    make: Callable[[Image.Image], Pixels]
    need: Need
    values: Values | None = None
    wide: bool = True


def still(size: ImageSize, fit: Fit, values: Values | None = None, wide: bool = True) -> Keep:
    """Images as networks are scored on them, [3, H, W]."""

    def make(image: Image.Image) -> Pixels:
        return to_array(fitted(image, size, fit))

    return Keep(make, partial(fitted_size, size=size, fit=fit), values, wide)


def read_bytes(split: Split, index: int) -> bytes:
    """A picture as it is encoded. Raises UnreadableImageError."""
    try:
        return split.read(index)
    except OSError as error:
        raise unreadable(split.name(index), error) from None


def decoded(
    split: Split, index: int, need: Need | None = None, values: Values | None = None
) -> tuple[bytes, DecodedImage]:
    """A picture's bytes and the picture, upright RGB. Raises UnreadableImageError."""
    content = read_bytes(split, index)
    return content, decode_image(content, split.name(index), need, values)


def decode_rows(split: Split, keep: Keep | None, rows: Sequence[int] | Labels) -> Decoded:
    """Decodes some pictures, in order: what is found of each, or why it cannot be read, and what is kept of it."""
    return threaded(partial(_decode_one, split, keep), rows)


def _decode_one(split: Split, keep: Keep | None, index: int) -> tuple[Outcome, Pixels | None]:
    try:
        content, found = decoded(split, index, *((keep.need, keep.values) if keep else ()))
    except UnreadableImageError as error:
        return (UnreadNow if isinstance(error, UnreadNowError) else str)(error), None
    seen = Seen(*found.size, digest_of(content, content, len(content)), first_bits(content), found.span)
    kept = keep is not None and (keep.wide or found.span is None)
    return seen, keep.make(found.image) if keep and kept else None


def look_at_headers(split: Split, rows: Sequence[int] | Labels) -> Decoded:
    """What `decode_rows` finds of some pictures, by their headers where these suffice; nothing is kept.

    In processes if there are many: Pillow reads headers in Python, so threads would wait for each other.
    """
    if len(rows) < MANY or available_cores() == 1:
        yield from (_look_at_header(split, int(row)) for row in rows)
        return
    global _forked_with
    _forked_with = split
    parts = np.array_split(np.asarray(rows), len(rows) // 512)
    with ProcessPoolExecutor(min(16, available_cores()), get_context("fork"), _ignore_interrupts) as pool:
        for found in pool.map(_look_at_some, parts):
            yield from ((outcome, None) for outcome in found)


_forked_with: Split | None = None  # what processes inherit instead of a copy


def _look_at_some(rows: Labels) -> list[Outcome]:
    assert _forked_with is not None
    return [_look_at_header(_forked_with, int(row))[0] for row in rows]


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits is interrupted, and ends these


def _look_at_header(split: Split, index: int) -> tuple[Outcome, None]:
    """A picture by its header and both ends of its file; decoded if these leave a doubt, for they name no fault."""
    with contextlib.suppress(Exception), split.open(index) as file:
        begin = end = file.read(2 * ENDS + 1)
        size = len(begin)
        if size > 2 * ENDS:
            size = file.seek(0, io.SEEK_END)
            file.seek(-ENDS, io.SEEK_END)
            end = file.read()
        with open_image(begin if size == len(begin) else file) as image:
            if is_whole(image, begin, end, size):
                content = first_bits(begin) if size <= 2 * ENDS else 0
                return Seen(*upright_size(image), content or digest_of(begin, end, size), content), None
    return _decode_one(split, None, index)[0], None


def threaded(one: Callable[[int], T], indices: Sequence[int] | Labels) -> Iterator[T]:
    """`one` of each index, in order, from a thread for each core."""

    def several(numbers: Sequence[int] | Labels) -> list[T]:
        return [one(int(number)) for number in numbers]

    with ThreadPoolExecutor(min(16, available_cores())) as pool:
        for start in range(0, len(indices), 512):  # in slices, so that results do not pile up
            parts = [indices[at : at + 16] for at in range(start, min(start + 512, len(indices)), 16)]
            yield from itertools.chain.from_iterable(pool.map(several, parts))
