"""Random numbers as a pure function of where they are used: no generator, no state, vectorised."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# One stream for each purpose, so that no two purposes share their numbers.
ORDER, GEOMETRY, ERASE, MIX, PIPELINE, STEP, SPLIT, TEACHER, CORRUPTION, BALANCE, SHARDS, FEW = range(1, 13)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seeds(seed: int, stream: int, epoch: int, index: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """One 64-bit seed for each index, a pure function of (seed, stream, epoch, index)."""
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for word in (seed, stream, epoch):
            state = _mix(state + _GOLDEN + np.uint64(word))
        return _mix(state + _GOLDEN + np.asarray(index, dtype=np.uint64) * _GOLDEN)


def uniforms(seed: int, stream: int, epoch: int, index: npt.ArrayLike, count: int) -> Array:
    """Uniform numbers in [0, 1), [len(index), count]; each row a pure function of (seed, stream, epoch, index)."""
    with np.errstate(over="ignore"):
        start = seeds(seed, stream, epoch, index)[:, None]
        bits = _mix(start + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, stream: int, epoch: int, length: int) -> npt.NDArray[np.int64]:
    """A random order of `length` indices, a pure function of (seed, stream, epoch)."""
    return np.argsort(seeds(seed, stream, epoch, np.arange(length)), kind="stable")


LARGE = 2**21  # indices; of more, an order is computed place by place, and never held
_ROUNDS = 6


def shuffled(seed: int, stream: int, epoch: int, length: int, places: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """What stands at some places of a random order of `length` indices, a pure function of (seed, stream, epoch).

    Takes memory and time for the places alone. A Feistel network permutes a power of four; an index outside `length` is
    permuted again until it is inside (cycle walking: Black and Rogaway, CT-RSA 2002), less than four times on average.
    It is another order than `permutation`'s.
    """
    half = max(1, (length - 1).bit_length() + 1 >> 1)  # bits
    low = np.uint64(2**half - 1)
    keys = seeds(seed, stream, epoch, np.arange(_ROUNDS))

    def permuted(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = x >> np.uint64(half), x & low
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & low)
        return left << np.uint64(half) | right

    with np.errstate(over="ignore"):
        found = permuted(np.asarray(places, np.uint64))
        while len(outside := np.flatnonzero(found >= length)):
            found[outside] = permuted(found[outside])
    return found.astype(np.int64)


def scalar_seed(seed: int, stream: int, epoch: int, index: int) -> int:
    """One seed below 2^63, for generators that take a single number."""
    return int(seeds(seed, stream, epoch, [index])[0] >> np.uint64(1))
