"""Classes of unequal size: how much each counts, and epochs in which rare ones come more often."""

from collections.abc import Mapping, Sequence

import numpy as np

from coadvise.config.reading import nearest
from coadvise.config.schema import DataConfig
from coadvise.data import draws
from coadvise.data.sources.split import Labels, few
from coadvise.errors import UserError

UNBALANCED = 3


def unbalanced(images: Sequence[int]) -> bool:
    """Whether the largest class has more than `UNBALANCED` times the images of the smallest."""
    return max(images) > UNBALANCED * min(images)


def class_weights(how: DataConfig, classes: Sequence[str], images: Sequence[int]) -> tuple[float, ...] | None:
    """How much each class counts; None where all images count the same.

    "auto" is N / (K · n_k) for a class with n_k of N images of K classes, as scikit-learn's "balanced": each class
    counts the same in all, and the mean over images is 1. A class that a mapping does not name has weight 1.

    Args:
        images: training images of each class.

    Raises:
        UserError: a weight for a class that does not exist.
    """
    if how.balance == "none":
        return None
    given = how.class_weights
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - set(classes)):
            raise UserError(
                f"data.class_weights: there is no class '{unknown[0]}'{nearest(unknown[0], list(classes))}; the "
                f"classes are {few(classes)}"
            )
        return tuple(float(given.get(name, 1.0)) for name in classes)
    return tuple(sum(images) / (len(images) * count) for count in images)


def balanced_order(seed: int, epoch: int, labels: Labels, weights: Sequence[float]) -> Labels:
    """An epoch's order [N] in which an image comes about as often as its class's weight says, relative to the others.

    An image of relative weight w comes floor(w) or ceil(w) times (systematic sampling). A function of (seed, epoch).
    """
    count = len(labels)
    shuffled = draws.permutation(seed, draws.ORDER, epoch, count)
    rows = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class by class, each in another order every epoch
    ends = np.cumsum(np.asarray(weights, np.float64)[labels[rows]])
    points = (np.arange(count) + draws.uniforms(seed, draws.BALANCE, epoch, [count], 1)[0, 0]) * ends[-1] / count
    chosen = rows[np.minimum(np.searchsorted(ends, points, side="right"), count - 1)]
    return chosen[draws.permutation(seed, draws.BALANCE, epoch, count)]
