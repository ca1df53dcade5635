"""Labels that are probably wrong: predictions for each picture by models that were not shown its label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coadvise.errors import UserError
from coadvise.inspection.duplicates import Group
from coadvise.inspection.features import Floats

NEEDED = "checking data needs the packages imagehash and cleanlab: pip install 'coadvise[check]'"
FOLDS = 5
FEWEST = 5  # pictures of a class whose labels are judged
MOST_SHARE = 0.05  # of all pictures are listed: a weak predictor doubts many more
PENALTY = 0.01  # scikit-learn's C, on standardised features


@dataclass(frozen=True, eq=False)
class Doubts:
    """How much each label is doubted.

    Attributes:
        probabilities: [N, K], of models that have not seen the picture's label.
        ranking: numbers of the judged pictures, the most doubtful label first.
        suspects: the first of these, at most `MOST_SHARE` of all pictures: labels that are probably wrong.
        agreement: the share of judged pictures whose label is the most probable class.
    """

    probabilities: npt.NDArray[np.float64]
    ranking: tuple[int, ...]
    suspects: tuple[int, ...]
    agreement: float


def doubts(features: Sequence[Floats], labels: npt.NDArray[np.int64], groups: Sequence[Group]) -> Doubts:
    """Ranks labels by confident learning (cleanlab) on cross-fitted predictions.

    Args:
        features: [N, D] in each of several ways; the predictions of all ways are averaged.
        labels: [N]; classes of fewer than `FEWEST` pictures are not judged.
        groups: pictures that are the same; none is predicted by a model that has seen another of its group.

    Raises:
        UserError: the package cleanlab is missing.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        raise UserError(NEEDED) from None
    counts = np.bincount(labels)
    judged = np.flatnonzero(counts[labels] >= FEWEST)
    probabilities = np.zeros((len(labels), len(counts)))
    classes, own = np.unique(labels[judged], return_inverse=True)
    if len(classes) < 2:
        return Doubts(probabilities, (), (), float("nan"))
    folds = _folds(own, _group_of(len(labels), groups)[judged])
    shares = np.mean([_cross_fitted(one[judged], own, folds) for one in features], axis=0)
    probabilities[np.ix_(judged, classes)] = shares
    ranking = np.argsort(get_label_quality_scores(own, shares, method="self_confidence"), kind="stable")
    issues = set(find_label_issues(own, shares, return_indices_ranked_by="self_confidence", n_jobs=1).tolist())
    most = max(1, round(MOST_SHARE * len(labels)))
    suspects = [row for row in ranking.tolist() if row in issues][:most]
    agreement = float((shares.argmax(1) == own).mean())
    return Doubts(probabilities, tuple(judged[ranking].tolist()), tuple(judged[suspects].tolist()), agreement)


def _group_of(count: int, groups: Sequence[Group]) -> npt.NDArray[np.int64]:
    """[N] the first picture of each one's group."""
    first = np.arange(count)
    for group in groups:
        first[list(group)] = first[group[0]]
    return first


def _folds(labels: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[N] which fold each picture is predicted in: all of a group in one, each class in all."""
    from sklearn.model_selection import StratifiedKFold

    folds = np.empty(len(labels), np.int64)
    divided = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(labels, labels)
    for fold, (_, rows) in enumerate(divided):
        folds[rows] = fold
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return folds[first][group]


def _cross_fitted(
    features: Floats, labels: npt.NDArray[np.int64], folds: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """[N, K] probabilities by logistic regressions, each fitted to the other folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = np.zeros((len(labels), labels.max() + 1))
    for fold in range(FOLDS):
        rows = folds == fold
        if not rows.any():
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, tol=1e-3, max_iter=300))
        model.fit(features[~rows], labels[~rows])
        found[np.ix_(rows, model.classes_)] = model.predict_proba(features[rows])
    return found
