"""Counter-based random numbers: pure, uniform, uncorrelated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coadvise.data import draws

words = st.integers(0, 2**31 - 1)
indices = st.lists(st.integers(0, 2**40), min_size=1, max_size=20)


def splitmix(x: int) -> int:
    """SplitMix64's finaliser on Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def reference_seed(seed: int, stream: int, epoch: int, index: int) -> int:
    golden, state = 0x9E3779B97F4A7C15, 0
    for word in (seed, stream, epoch):
        state = splitmix((state + golden + word) % 2**64)
    return splitmix((state + golden * (index + 1)) % 2**64)


@given(words, st.integers(1, 8), words, indices)
def test_numbers_are_those_of_exact_arithmetic(seed: int, stream: int, epoch: int, index: list[int]) -> None:
    expected = [reference_seed(seed, stream, epoch, i) for i in index]
    assert draws.scalar_seed(seed, stream, epoch, index[0]) == expected[0] >> 1
    assert draws.seeds(seed, stream, epoch, index).tolist() == expected
    golden = 0x9E3779B97F4A7C15
    rows = [[(splitmix((s + golden * k) % 2**64) >> 11) / 2**53 for k in (1, 2, 3)] for s in expected]
    assert draws.uniforms(seed, stream, epoch, index, 3).tolist() == rows


@pytest.mark.parametrize("stream", range(1, 9))
def test_uniform_over_indices(stream: int) -> None:
    u = draws.uniforms(0, stream, 0, np.arange(50_000), 4)
    assert u.mean(0) == pytest.approx(0.5, abs=5 / np.sqrt(12 * 50_000))
    assert u.var(0) == pytest.approx(1 / 12, rel=0.03)
    for column in u.T:
        assert stats.chisquare(np.bincount((column * 128).astype(int), minlength=128)).pvalue > 1e-4
    pairs = (u[:, 0] * 16).astype(int) * 16 + (u[:, 1] * 16).astype(int)
    assert stats.chisquare(np.bincount(pairs, minlength=256)).pvalue > 1e-4


def test_uncorrelated_over_indices_columns_epochs_streams_and_seeds() -> None:
    n = 20_000
    base = draws.uniforms(3, draws.ERASE, 5, np.arange(n + 1), 6)
    series = [*base[:n].T, base[1:, 0]]  # six columns, and the next image's first
    for seed, stream, epoch in ((4, draws.ERASE, 5), (3, draws.MIX, 5), (3, draws.ERASE, 6), (5, draws.ERASE, 3)):
        series.append(draws.uniforms(seed, stream, epoch, np.arange(n), 1)[:, 0])
    correlation = np.corrcoef(series)[np.triu_indices(len(series), 1)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


@given(words, words, st.integers(0, 300))
def test_a_permutation_is_one(seed: int, epoch: int, length: int) -> None:
    assert np.array_equal(np.sort(draws.permutation(seed, draws.ORDER, epoch, length)), np.arange(length))


def test_permutations_are_even_and_differ_between_epochs() -> None:
    orders = np.array([draws.permutation(1, draws.ORDER, epoch, 12) for epoch in range(3000)])
    for position in orders.T:  # each thing is at each place equally often
        assert stats.chisquare(np.bincount(position, minlength=12)).pvalue > 1e-4
    assert len({tuple(order) for order in orders.tolist()}) == 3000


@given(words, words, st.integers(1, 400))
def test_a_computed_order_has_every_index_once(seed: int, epoch: int, length: int) -> None:
    order = draws.shuffled(seed, draws.ORDER, epoch, length, np.arange(length))
    assert sorted(order.tolist()) == list(range(length))
    some = np.arange(length)[:: max(1, length // 5)]
    assert np.array_equal(draws.shuffled(seed, draws.ORDER, epoch, length, some), order[some])


def test_a_computed_order_is_random() -> None:
    """Where an index comes, and what follows it, are uniform; epochs and seeds do not agree."""
    n = 100_000
    order = draws.shuffled(0, draws.ORDER, 0, n, np.arange(n))
    for series in (order[: n // 100], np.diff(order)[: n // 2] % n):
        assert stats.chisquare(np.bincount(series * 64 // n, minlength=64)).pvalue > 1e-4
    for other in (
        draws.shuffled(1, draws.ORDER, 0, n, np.arange(n)),
        draws.shuffled(0, draws.ORDER, 1, n, np.arange(n)),
    ):
        assert abs(np.corrcoef(order, other)[0, 1]) < 4.5 / np.sqrt(n)
    assert draws.shuffled(0, draws.ORDER, 0, 10**9, [0, 10**9 - 1]).max() < 10**9
