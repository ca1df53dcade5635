"""Label suspects: planted wrong labels come first, predictions are out of sample, rare classes are not judged."""

import builtins

import numpy as np
import pytest

from coadvise.errors import UserError
from coadvise.inspection.findings import Findings
from coadvise.inspection.suspects import FOLDS, MOST_SHARE, _folds, doubts


def blobs(rng: np.random.Generator, images: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Features of four classes, overlapping by their spread."""
    labels = np.arange(images) % 4
    return (np.eye(4)[labels] + spread * rng.standard_normal((images, 4))).astype(np.float32), labels


def test_a_planted_wrong_label_is_the_first_suspect(found: Findings) -> None:
    first = found.doubts.suspects[0]
    assert found.places[first].name in ("train/red/wrong.png", "train/green/two.png"), "these two look blue"
    assert found.suggested(first) == "blue"
    assert found.label(first) != "blue"
    assert found.doubts.agreement > 0.9


def test_half_of_the_planted_labels_are_among_the_first_of_the_ranking() -> None:
    rng = np.random.default_rng(0)
    features, labels = blobs(rng, 400, 0.35)
    wrong = rng.choice(400, 20, replace=False)
    planted = labels.copy()
    planted[wrong] = (labels[wrong] + rng.integers(1, 4, 20)) % 4
    judged = doubts([features, features[:, ::-1]], planted, [])
    assert np.isin(judged.ranking[:20], wrong).sum() >= 10
    assert sorted(judged.ranking) == [*range(400)]
    assert 0 < len(judged.suspects) <= MOST_SHARE * 400
    assert np.isin(judged.suspects, wrong).mean() >= 0.5
    assert np.allclose(judged.probabilities.sum(1), 1)


def test_a_label_is_not_among_what_its_prediction_was_fitted_to() -> None:
    features = np.eye(60, dtype=np.float32)  # nothing can be learned of a picture from the others
    labels = np.arange(60) % 2
    shares = doubts([features], labels, []).probabilities
    assert shares[np.arange(60), labels].max() < 0.6
    twice = np.concatenate([features, features])
    same = [(row, row + 60) for row in range(60)]
    shares = doubts([twice], np.tile(labels, 2), same).probabilities
    assert shares[np.arange(120), np.tile(labels, 2)].max() < 0.6, "nor is that of its copy"


def test_folds_hold_each_class_and_keep_copies_together() -> None:
    labels = np.repeat([0, 1, 2], 20)
    groups = np.arange(60)
    groups[[5, 25, 45]] = 5
    folds = _folds(labels, groups)
    assert len({*folds[[5, 25, 45]].tolist()}) == 1
    for label in range(3):
        assert {*folds[labels == label].tolist()} == {*range(FOLDS)}


def test_classes_of_few_pictures_are_not_judged() -> None:
    features, labels = blobs(np.random.default_rng(1), 80, 0.1)
    labels = np.concatenate([labels, [4, 4]])
    features = np.concatenate([features, features[:2]])
    judged = doubts([features], labels, [])
    assert len(judged.ranking) == 80
    assert not {80, 81} & {*judged.ranking, *judged.suspects}
    few = doubts([features[:6]], np.array([0, 0, 0, 1, 1, 1]), [])
    assert few.ranking == few.suspects == ()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("cleanlab"):
            raise ImportError
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"coadvise\[check\]"):
        doubts([np.ones((4, 1), np.float32)], np.array([0, 0, 1, 1]), [])
