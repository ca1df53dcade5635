"""Pictures that are there more than once: byte for byte, or resized and recompressed."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from coadvise.data.images import Pixels

Ints = npt.NDArray[np.int64]
Group = tuple[int, ...]  # numbers of pictures, in order

# Chosen on copies of photographs at 0.35 to 1.5 times the size, as JPEG, PNG and WebP (docs/LOG.md).
MOST_BITS = 6  # of 64 by which perceptual hashes of one picture differ
MOST_DIFFERENCE = 0.15  # between small copies of one picture, relative to the contrast of the flatter one
LEAST_DIFFERENCE = 1.5  # of 255: pictures without contrast may differ by rounding
MOST_NEIGHBOURS = 512  # compared with a picture, among those that share a part of its hash; blank ones are thousands
_ONES = np.array([number.bit_count() for number in range(2**16)], np.uint8)
_CHUNK = 2**13  # pairs compared at once


def exact_groups(digests: Sequence[str]) -> list[Group]:
    """Pictures with the same bytes, two or more each."""
    found = defaultdict(list)
    for number, digest in enumerate(digests):
        found[digest].append(number)
    return [tuple(numbers) for numbers in found.values() if len(numbers) > 1]


def near_groups(digests: Sequence[str], hashes: npt.NDArray[np.uint64], looks: Pixels) -> list[Group]:
    """Pictures that look the same though their bytes differ; those with the same bytes as one of them too.

    Args:
        hashes: [N] perceptual hashes.
        looks: [N, S, S, 3] small copies.
    """
    first: dict[str, int] = {}
    own = np.array([first.setdefault(digest, number) for number, digest in enumerate(digests)], np.int64)
    several = np.flatnonzero(own == np.arange(len(own)))
    pairs = several[near_pairs(hashes[several], looks[several])]
    if not len(pairs):
        return []
    ends = np.concatenate([pairs, np.stack([np.arange(len(own)), own], 1)]).T
    graph = coo_array((np.ones(ends.shape[1], bool), (ends[0], ends[1])), shape=(len(own), len(own)))
    groups = defaultdict(list)
    for number, group in enumerate(connected_components(graph, directed=False)[1].tolist()):
        groups[group].append(number)
    return [tuple(numbers) for numbers in groups.values() if len({digests[n] for n in numbers}) > 1]


def near_pairs(hashes: npt.NDArray[np.uint64], looks: Pixels) -> Ints:
    """[M, 2] rows of pictures that look the same.

    Hashes that differ in at most 6 of 64 bits agree in two or more of their 8 bytes. So pictures are sorted by each two
    bytes, and only those that share both are compared: their hashes first, then their small copies.
    """
    values = hashes.view(np.uint8).reshape(-1, 8).astype(np.uint32)
    flat = looks.reshape(len(looks), -1)
    brightness = flat.mean(1)
    contrast = flat.std(1)
    found = [np.empty((0, 2), np.int64)]
    for one, other in combinations(range(8), 2):
        key = values[:, one] << 8 | values[:, other]
        order = np.lexsort((brightness, hashes, key))
        key = key[order]
        longest = int(np.bincount(key, minlength=1).max()) if len(key) else 0
        for step in range(1, min(longest, MOST_NEIGHBOURS + 1)):
            rows = np.flatnonzero(key[:-step] == key[step:])
            pairs = np.sort(np.stack([order[rows], order[rows + step]], 1), 1)
            differing = hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]
            close = _ONES[differing.view(np.uint16).reshape(-1, 4)].sum(1) <= MOST_BITS
            pairs = pairs[close & ((differing > 0) | (other == 1))]  # equal hashes meet for every two bytes
            found += [chunk[_look_alike(flat, contrast, chunk)] for chunk in _chunks(pairs)]
    return np.unique(np.concatenate(found), axis=0)


def _chunks(pairs: Ints) -> list[Ints]:
    return [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]


def _look_alike(looks: Pixels, contrast: npt.NDArray[np.float64], pairs: Ints) -> npt.NDArray[np.bool_]:
    difference = looks[pairs[:, 0]].astype(np.float32) - looks[pairs[:, 1]]
    most = np.maximum(MOST_DIFFERENCE * contrast[pairs].min(1), LEAST_DIFFERENCE)
    return np.sqrt((difference**2).mean(1)) <= most
