"""Where a student's tokens look in the scored pictures: how much of it is the same, and pictures for the report."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from coadvise.data.images import Pixels
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources.split import evenly
from coadvise.errors import UserError
from coadvise.models.attention import AttentionMaps, attention_maps, overlap
from coadvise.models.network import Network
from coadvise.report.attention import darkened, encoded

Floats = npt.NDArray[np.float64]
MOST = 250  # pictures, evenly chosen, over which overlaps are averaged


def attention_overlaps(network: Network, split: ScannedSplit) -> list[dict[str, Any]]:
    """`AttentionMaps.overlaps` and the number of pictures; empty for a student without attention.

    Args:
        network: A student with all of its tokens, on the CPU.
        split: The scored pictures.
    """
    rows = evenly(len(split), MOST)
    try:
        _, maps = _maps(network, split, rows)
    except UserError:  # a Mixer or a ResNet
        return []
    return [{**pair, "images": len(rows)} for pair in maps.overlaps()]


def overlap_by_image(network: Network, split: ScannedSplit, tokens: tuple[str, str], rule: str) -> Floats:
    """The share of two tokens' maps that is the same, [N], for up to `MOST` pictures.

    Args:
        network: A student with all of its tokens, on the CPU.
        split: The scored pictures.
        rule: "last" or "rollout", a field of `AttentionMaps`.
    """
    _, maps = _maps(network, split, evenly(len(split), MOST))
    one, other = (getattr(maps, rule)[token] for token in tokens)
    return overlap(one, other).double().numpy()


def darkened_by_token(network: Network, split: ScannedSplit, row: int) -> Mapping[str, bytes]:
    """A picture of the split by token, dark where it does not look in the last block, as JPEG files."""
    (pixels,), maps = _maps(network, split, [row])
    picture = Image.fromarray(pixels.transpose(1, 2, 0))
    return {name: encoded(darkened(picture, own[0].numpy()), "JPEG") for name, own in maps.last.items()}


def _maps(network: Network, split: ScannedSplit, rows: list[int]) -> tuple[Pixels, AttentionMaps]:
    """Pixels [N, 3, H, W], and where the tokens look in them."""
    pixels = np.stack([split.still(row, network.image_size) for row in rows])
    return pixels, attention_maps(network, torch.from_numpy(pixels).float().div_(255))
