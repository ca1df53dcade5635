"""Classes of unequal size: weights, and orders in which rare classes come more often."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from coadvise.config.schema import DataConfig
from coadvise.data.balance import balanced_order, class_weights
from coadvise.errors import UserError

LABELS = np.repeat([0, 1, 2], [60, 30, 10])


def weights(balance: str = "loss", given: object = "auto") -> tuple[float, ...] | None:
    how = DataConfig.model_validate({"balance": balance, "class_weights": given})
    return class_weights(how, ("a", "b", "c"), np.bincount(LABELS).tolist())


def test_automatic_weights_are_scikit_learn_s() -> None:
    assert weights() == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=LABELS))
    assert np.mean(np.array(weights())[LABELS]) == pytest.approx(1)
    assert weights("none") is None


def test_weights_can_be_given() -> None:
    assert weights(given={"c": 5, "a": 0.5}) == (0.5, 1, 5)
    with pytest.raises(UserError, match=r"no class 'd'.*the classes are 'a', 'b', 'c'"):
        weights(given={"d": 2})


@given(st.integers(0, 10**6), st.integers(0, 50), st.tuples(*3 * [st.floats(0.1, 20)]))
def test_images_come_as_often_as_their_weights_say(seed: int, epoch: int, given: tuple[float, ...]) -> None:
    order = balanced_order(seed, epoch, LABELS, given)
    assert np.array_equal(order, balanced_order(seed, epoch, LABELS, given))
    assert len(order) == len(LABELS)
    expected = len(LABELS) * np.array(given)[LABELS] / np.array(given)[LABELS].sum()
    counts = np.bincount(order, minlength=len(LABELS))
    assert (np.abs(counts - expected) < 1 + 1e-9).all()
    wanted = np.bincount(LABELS, expected)
    assert (np.abs(np.bincount(LABELS[order], minlength=3) - wanted) <= 1 + 1e-9).all()


def test_epochs_differ_and_balanced_classes_come_equally_often() -> None:
    orders = [balanced_order(0, epoch, LABELS, weights() or ()) for epoch in range(30)]
    assert len({tuple(order) for order in orders}) == 30
    shown = np.bincount(LABELS[np.concatenate(orders)])
    assert (np.abs(shown / 30 - 100 / 3) < 1).all()
    seen = np.bincount(np.concatenate(orders), minlength=100)
    assert seen.min() > 0, "no image is left out for good"
