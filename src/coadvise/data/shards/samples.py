"""A picture as it goes into a shard, and a shard as bytes: the same, whoever makes it."""

import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from coadvise.data.decoding import read_bytes, threaded
from coadvise.data.images import UnreadableImageError, UnreadNowError, decode_image, digest_of, first_bits, open_image
from coadvise.data.shards.index import IN_SHARD
from coadvise.data.sources import Split
from coadvise.data.sources.split import Labels
from coadvise.data.store import Seen, presized_size
from coadvise.errors import StorageError

QUALITY = 95  # of presized JPEGs
LONGEST = 8  # characters of an ending that is kept; a name in a tar file has at most 100
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


class Sample(NamedTuple):
    """An encoded picture, the ending of its name, and what a scan finds of it; None if it cannot be decoded."""

    content: bytes
    ending: str
    seen: Seen | None


Sampler = Callable[[Split, int], Sample]


def sample(split: Split, row: int, presize: int) -> Sample:
    """A picture of a split, with a shorter side of at most `presize` pixels (0: as it is).

    JPEGs stay JPEGs, others become PNG; pictures of more than 8 bits keep their size, since their values count.

    Raises:
        StorageError: a picture could not be read, and another attempt may succeed.
    """
    name = split.name(row)
    content = b""
    try:
        content = read_bytes(split, row)
        found = decode_image(content, name)
        with open_image(content) as header:
            form = header.format or ""
    except UnreadNowError as error:
        raise StorageError(f"{error}; run the same command again, which goes on with what is missing") from None
    except UnreadableImageError:
        return Sample(content, _suffix(name), None)
    if presize and found.span is None and (small := presized_size(found.size, presize)) != found.size:
        form, buffer = ("JPEG" if form in ("JPEG", "MPO") else "PNG"), io.BytesIO()
        resized = found.image.resize(small, Image.Resampling.BICUBIC)
        resized.save(buffer, form, **({"quality": QUALITY} if form == "JPEG" else {}))
        content, found = buffer.getvalue(), found._replace(size=small)
    seen = Seen(*found.size, digest_of(content, content, len(content)), first_bits(content), found.span)
    return Sample(content, _ENDINGS.get(form, form.lower()), seen)


def packed(split: Split, rows: Labels, classes: tuple[str, ...], sampler: Sampler) -> tuple[bytes, dict[str, Any]]:
    """A tar file of some pictures, a member NUMBER.ENDING and NUMBER.json each; and the columns `IN_SHARD` of them."""
    columns, buffer = {field: list[Any]() for field in IN_SHARD}, io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, found in zip(rows.tolist(), threaded(partial(sampler, split), rows), strict=True):
            label = int(split.labels[row])
            about = {"label": label, "class": classes[label], "name": split.name(row)}
            _add(tar, f"{row:09d}.{found.ending}", found.content)
            place = buffer.tell() - padded(len(found.content)), len(found.content)
            seen = found.seen or Seen(0, 0, 0, first_bits(found.content))
            for field, value in zip(IN_SHARD, (*place, *seen[:4], seen.span or (None, None)), strict=True):
                columns[field].append(value)
            _add(tar, f"{row:09d}.json", json.dumps(about).encode())
    return buffer.getvalue(), columns


def padded(size: int) -> int:
    """Bytes that content of some size takes in a tar file."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _suffix(name: str) -> str:
    ending = PurePosixPath(name).suffix[1:].lower()
    return ending if ending.isalnum() and len(ending) <= LONGEST else "bin"
