"""Orders of pictures in shards: every picture once, whole shards a window, and a folder's order with all of them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from coadvise.data import draws
from coadvise.data.order import WindowedOrder

SHARDS = st.lists(st.integers(0, 5), min_size=1, max_size=40).map(lambda found: np.array(found, np.int64))


@settings(max_examples=12)
@given(SHARDS, st.integers(1, 4), st.integers(0, 3), st.data())
def test_each_picture_comes_once_in_windows_of_whole_shards(
    shards: np.ndarray, window: int, epoch: int, data: st.DataObject
) -> None:
    order = WindowedOrder(7, shards, window)
    whole = order.rows(epoch, np.arange(len(shards)))
    assert sorted(whole.tolist()) == list(range(len(shards)))
    windows = np.array([order.number(epoch, place) for place in range(len(shards))])
    assert windows.tolist() == sorted(windows.tolist())
    assert windows[-1] + 1 == order.windows == -(-len({*shards.tolist()}) // window)
    for number in range(order.windows):
        inside = whole[windows == number]
        assert len({*shards[inside].tolist()}) <= window
        assert not {*shards[inside].tolist()} & {*shards[whole[windows != number]].tolist()}
        assert sorted(order.members(epoch, number).tolist()) == sorted(inside.tolist())
    places = np.array(data.draw(st.lists(st.integers(0, len(shards) - 1), max_size=12)), np.int64)
    fresh = WindowedOrder(7, shards, window)  # no step needs one before it
    assert np.array_equal(fresh.rows(epoch, places), whole[places])


@given(SHARDS, st.integers(0, 5), st.integers(0, 2**31 - 1))
def test_a_window_of_all_shards_gives_the_order_of_a_folder(shards: np.ndarray, epoch: int, seed: int) -> None:
    own = WindowedOrder(seed, shards, len({*shards.tolist()})).rows(epoch, np.arange(len(shards)))
    assert np.array_equal(own, draws.permutation(seed, draws.ORDER, epoch, len(shards)))


def test_epochs_take_the_shards_in_another_order() -> None:
    order = WindowedOrder(0, np.arange(200) // 10, 2)
    first = [{*(order.members(epoch, 0) // 10).tolist()} for epoch in range(6)]
    assert len({frozenset(shards) for shards in first}) > 3
    assert np.array_equal(order.members(3, order.windows), order.members(4, 0))
