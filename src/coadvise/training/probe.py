"""A linear probe: the head of a frozen network, trained on its features of some epochs of views (arXiv 2402.11305)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coadvise.config.schema import AugmentConfig
from coadvise.data.loader import epoch_batches
from coadvise.data.views import Views
from coadvise.errors import Interrupted, UserError
from coadvise.models.network import Network
from coadvise.training.engine import Engine
from coadvise.training.loop import Progress

EPOCHS = 3  # of views, at most; more add little to a frozen network
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # weight decays that are tried, relative to the mean loss of an image
HELD_OUT = 0.2  # of the training images of each class, to choose the weight decay


@dataclass(frozen=True)
class Probed:
    """How a head was trained.

    Attributes:
        weight_decay: the best on held-out training images.
        top1: share of these that were right with it.
        views: how many views it was trained on.
    """

    weight_decay: float
    top1: float
    views: int


def epochs_of(augment: AugmentConfig) -> int:
    """How many epochs of views the head is trained on."""
    return min(augment.recycle or EPOCHS, EPOCHS)


def probe(
    part: str, network: Network, views: Views, engine: Engine, workers: int, weights: Sequence[float] | None,
    progress: Progress,
) -> Probed:  # fmt: skip
    """Trains a network's head, in place. Its body stays as it is, in evaluation mode.

    Args:
        views: training views, which are not mixed.
        weights: how much each class counts; None: as its images do.

    Raises:
        Interrupted: a signal asked for a stop; nothing is kept, since a probe takes seconds to minutes.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from sklearn.model_selection import train_test_split

    epochs = epochs_of(views.augment)
    features, rows = _features(part, network, views, epochs, engine, workers, progress)
    labels = views.split.labels[rows]
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / deviation

    def head(chosen: np.ndarray[Any, Any], strength: float) -> Any:
        _check_stop(part, engine)
        inverse = 1 / (strength * len(chosen))
        given = None if weights is None else dict(enumerate(weights))
        model = LogisticRegression(C=inverse, max_iter=200, tol=1e-3, class_weight=given)
        return model.fit(features[chosen], labels[chosen])

    images = np.arange(len(views.split))
    counts = np.bincount(views.split.labels)
    stratify = views.split.labels if counts.min() > 1 and HELD_OUT * len(images) >= len(counts) else None
    fitted, held_out = train_test_split(images, test_size=HELD_OUT, random_state=0, stratify=stratify)
    own, others = np.flatnonzero(np.isin(rows, fitted)), np.flatnonzero(np.isin(rows, held_out))
    right = {strength: head(own, strength).score(features[others], labels[others]) for strength in STRENGTHS}
    best = max(right, key=lambda strength: (right[strength], strength))
    found = head(np.arange(len(rows)), best)
    _set_head(network, found, mean, deviation)
    return Probed(best, float(right[best]), len(rows))


def _features(
    part: str, network: Network, views: Views, epochs: int, engine: Engine, workers: int, progress: Progress
) -> tuple[Any, Any]:
    """What the head sees of every view, [N, D] float32, and the row of each view's image, [N]."""
    engine.prepare(network)
    network.eval()
    found, rows = list[Tensor](), list[Tensor]()
    total, done = epochs * -(-len(views) // 64), 0
    for epoch in range(epochs):
        for batch in epoch_batches(views, epoch, 64, workers):
            _check_stop(part, engine)
            placed = engine.place(batch)
            with torch.inference_mode(), engine.autocast():
                found.append(network.features(placed.images).float().cpu())
            rows.append(batch.index)
            progress(part, done := done + 1, total, {})
    return torch.cat(found).numpy(), torch.cat(rows).numpy()


def _check_stop(part: str, engine: Engine) -> None:
    if engine.any_rank(engine.stop_requested)[0]:
        raise Interrupted(f"stopped before the probe of {part} was done; it begins again")


def _set_head(network: Network, found: Any, mean: Any, deviation: Any) -> None:
    """Weights of standardised features become those of plain ones; two classes have one row in scikit-learn."""
    coefficients, constants = found.coef_, found.intercept_
    if len(coefficients) == 1:
        coefficients, constants = (
            np.concatenate([-coefficients, coefficients]) / 2,
            np.concatenate([-constants, constants]) / 2,
        )
    weight = coefficients / deviation
    head: Any = network.model.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight).view_as(head.weight))
        head.bias.copy_(torch.from_numpy(constants - weight @ mean))


def check_head(name: str, network: Network) -> None:
    """Raises UserError for a network whose head is not one linear layer with a bias."""
    try:
        head: Any = network.model.get_classifier()  # type: ignore[operator]
    except AttributeError:
        head = None
    if not isinstance(head, nn.Linear | nn.Conv2d) or head.bias is None:
        raise UserError(
            f"teachers.{name}.adapt=probe: the head of '{network.about['model']}' is no linear layer with a bias; give "
            "adapt=finetune"
        )
