"""The nearest pictures, against all similarities computed one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_images

from coadvise.data.scan import scan, scan_split
from coadvise.data.sources import open_source
from coadvise.deploy.publish import load
from coadvise.evaluation import nearest as nearest_module
from coadvise.evaluation.nearest import Nearest


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_nearest_are_those_of_the_largest_cosine(
    in_memory: bool, finished: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_module, "BATCH", 7)
    network, steps = load(finished).network, []
    dataset = scan(open_source(tiny_images), 16, in_memory)
    found = Nearest(network, dataset.train, lambda part, done, total, figures: steps.append((part, done, total)))
    assert found.rows == list(range(24))
    assert steps == [("pictures", done, 24) for done in (7, 14, 21, 24)]

    def features(row: int, split: str) -> np.ndarray:
        pixels = torch.from_numpy(dataset.splits[split].still(row, 16)[None]).float() / 255
        with torch.no_grad():
            return network.features(pixels)[0].numpy()

    for row in (0, 5, 11):
        own = features(row, "val")
        others = [features(place, "train") for place in range(24)]
        cosines = np.array([own @ other / np.linalg.norm(own) / np.linalg.norm(other) for other in others])
        picture = torch.from_numpy(dataset.val.still(row, 16)[None]).float() / 255
        rows, values = zip(*found(picture, 5), strict=True)
        np.testing.assert_allclose(values, np.sort(cosines)[::-1][:5], atol=1e-5)
        np.testing.assert_allclose(cosines[list(rows)], values, atol=1e-5)


def test_many_are_chosen_evenly(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_module, "MOST", 4)
    source = open_source(make_images(tmp_path, train=4, val=1))
    split = scan_split(source.train, 16, True)
    found = Nearest(load(finished).network, split, lambda *told: None)
    assert found.rows == [0, 3, 6, 9]
    picture = torch.from_numpy(split.still(6, 16)[None]).float() / 255
    assert found(picture, 9)[0] == (6, pytest.approx(1.0))
    assert sorted(row for row, _ in found(picture, 9)) == found.rows
