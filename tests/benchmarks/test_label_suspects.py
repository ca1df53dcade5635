"""Planted faults: the committed figures are what was asked for and what their page says, and the tool still runs."""

import json
from pathlib import Path
from statistics import mean

import numpy as np
from benchmarks.label_suspects import copies_found, curve, document, plant, with_wrong_labels

from coadvise.data.sources import open_source
from coadvise.inspection.pictures import look_through

RESULTS = Path(__file__).parents[2] / "results" / "label-suspects"


def test_the_committed_figures_reach_the_goals_and_are_on_the_page() -> None:
    found = json.loads((RESULTS / "curve.json").read_text())
    assert (found["data"], found["wrong"], len(found["seeds"])) == ("trashnet", 0.05, 3)
    assert min(one["0.05"] for one in found["recall"]["tf_efficientnet_lite0"]) >= 0.5
    totals = {key: sum(one[key] for one in found["copies"]) for key in found["copies"][0]}
    assert totals["found"] >= 0.95 * totals["planted"] == 0.95 * 90
    assert totals["right"] >= 0.95 * totals["groups"]
    assert (RESULTS / "curve.md").read_text() == document(found)


def test_wrong_labels_are_wrong_and_as_many_as_asked_for(photos: Path, tmp_path: Path) -> None:
    labels = np.arange(200) % 3
    planted, wrong = with_wrong_labels(labels, 0.05, seed=1)
    assert len(wrong) == 10
    assert (planted != labels).nonzero()[0].tolist() == wrong.tolist()
    assert planted.max() <= 2
    plant(str(photos), 0.2, 0, tmp_path / "wrong.csv")
    source, old = open_source(tmp_path / "wrong.csv"), open_source(photos)
    assert len(source.train) == len(old.train)
    assert source.classes == old.classes
    splits = (source.train, source.val)
    places = [
        (name, source.classes[label])
        for split in splits
        for name, label in zip(split.names(), split.labels, strict=True)
    ]
    assert sum(Path(name).parent.name != label for name, label in places) == round(0.2 * 36)


def test_faults_planted_in_photographs_are_found(photos: Path) -> None:
    source = open_source(photos)
    found = curve(look_through(source, None, 0), 0.1, [0, 1])
    assert mean(one["0.1"] for one in found) >= 0.3
    assert [one["1"] for one in found] == [1.0, 1.0]
    copies = copies_found(source, 6, 0)
    assert copies["planted"] == 6
    assert copies["found"] >= 5
    assert copies["right"] == copies["groups"]
