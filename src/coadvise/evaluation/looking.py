"""Where a student's tokens look in the scored pictures: how much of it is the same, and pictures for the report."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from coadvise.config.schema import ImageSize
from coadvise.data.scanned import ScannedSplit
from coadvise.errors import UserError
from coadvise.models.attention import Looks, looks
from coadvise.models.network import Network
from coadvise.report.look import darkened, encoded

MOST = 250  # pictures, evenly chosen, over which overlaps are averaged
AT_ONCE = 25  # of them; their attention is kept
KINDS = ("last", "rollout")


class Looking:
    """A student and pictures for it to look at. The network is on the CPU and keeps all of its tokens."""

    def __init__(self, network: Network, split: ScannedSplit, image_size: ImageSize) -> None:
        self.network, self.split, self.image_size = network.eval(), split, image_size

    def overlaps(self) -> list[dict[str, Any]]:
        """See `Looks.overlaps`; empty for a student without attention."""
        rows = np.unique(np.linspace(0, len(self.split) - 1, min(MOST, len(self.split))).astype(int)).tolist()
        chunks = [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]
        try:
            found = [self._looks(chunk)[1].overlaps() for chunk in chunks]
        except UserError:  # a Mixer or a ResNet
            return []
        shares = [len(chunk) / len(rows) for chunk in chunks]
        return [
            {
                "tokens": same[0]["tokens"],
                **{kind: sum(w * pair[kind] for w, pair in zip(shares, same, strict=True)) for kind in KINDS},
                "images": len(rows),
            }
            for same in zip(*found, strict=True)
        ]

    def pictures(self, row: int) -> Mapping[str, bytes]:
        """A picture of the split by token, dark where it does not look in the last block, as JPEG files."""
        pixels, found = self._looks([row])
        picture = Image.fromarray(pixels[0].transpose(1, 2, 0))
        return {name: encoded(darkened(picture, look[0].numpy())) for name, look in found.last.items()}

    def _looks(self, rows: list[int]) -> tuple[Any, Looks]:
        pixels = np.stack([self.split.still(row, self.image_size) for row in rows])
        network = self.network
        return pixels, looks(network.model, (torch.from_numpy(pixels).float().div_(255) - network.mean) / network.std)
