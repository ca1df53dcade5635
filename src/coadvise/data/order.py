"""The order of an epoch's pictures: a function of (seed, epoch) alone, so any step can be the first.

Pictures are in the order of a hash of (seed, epoch, row). Where they lie in shards, the shards are shuffled and taken
a window at a time, and within a window the pictures are in the order of that same hash. So each process reads a few
shards at a time, and a window of all shards gives the order that a folder has. Of an epoch two windows are kept.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from coadvise.data import draws
from coadvise.data.sources.split import Labels


class WindowedOrder:
    """The orders of all epochs of pictures that lie in shards.

    Args:
        shards: [N], the shard that holds each picture.
        window: how many shards are shuffled together.
    """

    def __init__(self, seed: int, shards: Labels, window: int) -> None:
        self.seed, self.window = seed, window
        self._by_shard = np.argsort(shards, kind="stable")
        _, counts = np.unique(shards, return_counts=True)
        self._ends = np.concatenate([[0], np.cumsum(counts)])
        self._window_ends = lru_cache(2)(self._ends_of)
        self._window = lru_cache(2)(self._shuffled)

    @property
    def windows(self) -> int:
        """How many an epoch has."""
        return -(-(len(self._ends) - 1) // self.window)

    def rows(self, epoch: int, positions: Labels) -> Labels:
        """The rows at some positions of an epoch's order."""
        ends = self._window_ends(epoch)[1]
        numbers = np.searchsorted(ends, positions, side="right") - 1
        found = np.empty(len(positions), np.int64)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found[here] = self._window(epoch, number)[positions[here] - ends[number]]
        return found

    def number(self, epoch: int, position: int) -> int:
        """The window that a position lies in."""
        return int(np.searchsorted(self._window_ends(epoch)[1], position, side="right")) - 1

    def members(self, epoch: int, number: int) -> Labels:
        """The rows of a window's pictures, shard by shard; of a window past the end, those of the next epoch's."""
        if number >= self.windows:
            epoch, number = epoch + 1, number - self.windows
        order, _ = self._window_ends(epoch)
        chosen = order[number * self.window : (number + 1) * self.window]
        return np.concatenate([self._by_shard[self._ends[shard] : self._ends[shard + 1]] for shard in chosen])

    def _shuffled(self, epoch: int, number: int) -> Labels:
        rows = np.sort(self.members(epoch, number))
        return rows[np.argsort(draws.seeds(self.seed, draws.ORDER, epoch, rows), kind="stable")]

    def _ends_of(self, epoch: int) -> tuple[Labels, npt.NDArray[np.int64]]:
        """The shards of an epoch in order, and the position at which each window of them begins."""
        order = draws.permutation(self.seed, draws.SHARDS, epoch, len(self._ends) - 1)
        ends = np.concatenate([[0], np.cumsum(np.diff(self._ends)[order])])
        return order, ends[: -1 : self.window]
