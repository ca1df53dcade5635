"""Accuracy under corruptions, against counting it by hand with answers that are known."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_images
from torch import Tensor

from coadvise.data.scan import scan_split
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources import Split, evaluation_split
from coadvise.data.sources.folder import FolderSplit
from coadvise.errors import UserError
from coadvise.evaluation.corruptions import CORRUPTIONS, corrupt
from coadvise.evaluation.robustness import (
    ALEXNET_ERRORS,
    Case,
    corruption_scores,
    file_cases,
    made_cases,
    relative_to_alexnet,
)
from coadvise.training.listener import Silent

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return evaluation_split(make_images(tmp_path_factory.mktemp("shift"), 1, 2), CLASSES)


@pytest.fixture(scope="module")
def split(files: Split) -> ScannedSplit:
    return scan_split(files, 16, in_memory=True)


def with_bad(paths: Sequence[Path], labels: Sequence[int]) -> Split:
    return FolderSplit.of(Path(), map(str, paths), np.array(labels))


def brightest(batches: Iterable[Tensor]) -> dict[str, dict[str, Tensor]]:
    """A network that answers with the strongest colour, and whose second token always says green."""
    means = torch.cat([images.mean((2, 3)).flip(1) for images in batches])  # blue, green, red
    return {"students/advised-0": {"class": 50 * means, "conv": torch.tensor([[0.0, 9.0, 0.0]]).expand_as(means)}}


def test_made_cases_are_the_corrupted_images_whatever_subset_is_taken(split: ScannedSplit, files: Split) -> None:
    cases = list(made_cases(split, range(6), (2, 5), 16, seed=4, workers=0))
    assert [(case.name, case.severity) for case in cases] == [(name, s) for name in CORRUPTIONS for s in (2, 5)]
    some = scan_split(files.subset(range(1, 6, 2)), 16, in_memory=True)
    made = {}
    for case, fewer in zip(cases, made_cases(some, (1, 3, 5), (2, 5), 16, seed=4, workers=0), strict=True):
        images, few = torch.cat(list(case.batches)), torch.cat(list(fewer.batches))
        assert case.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert fewer.labels.tolist() == [0, 1, 2]
        assert torch.equal(images[1::2], few)
        made[case.name, case.severity] = images
    assert split.pixels is not None
    wanted = corrupt(split.pixels[0], "contrast", 2, 0)  # nothing random in it: any seed
    assert np.array_equal((made["contrast", 2][0] * 255).round().numpy().astype(np.uint8), wanted)
    twice = ScannedSplit(split.split.subset([0, 1]), split.labels[:2], split.pixels[[0, 0]], (), split.sizes)
    noisy = [torch.cat(list(next(made_cases(twice, (0, 1), (3,), 16, seed, workers=0)).batches)) for seed in (0, 1)]
    assert not torch.equal(*noisy[0]), "two images do not share their noise, nor two seeds"
    assert not torch.equal(*noisy)


def test_scores_count_images_by_corruption_and_severity() -> None:
    labels = torch.tensor([0, 1, 2, 1])

    def case(name: str, severity: int, right: int, labels: Tensor = labels) -> Case:
        colours = torch.nn.functional.one_hot((labels + (torch.arange(len(labels)) >= right)) % 3, 3).flip(1)
        return Case(name, severity, labels, [colours[:, :, None, None].float().expand(-1, -1, 2, 2)])

    cases = [case(name, severity, 4 if name == "fog" else severity - 1) for name in CORRUPTIONS for severity in (1, 4)]
    more = [*cases[:-1], case("jpeg_compression", 4, 3, labels[:3]), case("jpeg_compression", 4, 0, labels[3:])]
    steps: list[tuple[int, int]] = []

    class Steps(Silent):
        def progress(self, part: str, done: int, total: int, figures: object) -> None:
            steps.append((done, total))

    for given in (cases, more):  # one severity may come in pieces
        found = corruption_scores(brightest, given, len(given), Steps())
        answers = found["parts"]["students/advised-0"]
        assert answers["class"]["by_severity"]["snow"] == {"1": 0.0, "4": 0.75}
        assert answers["class"]["top1"] == {name: 1.0 if name == "fog" else 0.375 for name in CORRUPTIONS}
        assert answers["class"]["mean_corruption_error"] == pytest.approx(1 - (14 * 0.375 + 1) / 15)
        assert answers["conv"]["top1"]["snow"] == 0.5
        assert answers.keys() == {"class", "conv", "average"}
        assert (found["images"], found["severities"]) == (4, [1, 4])
        assert steps[-1] == (len(given), len(given))


def test_alexnet_s_own_errors_are_one() -> None:
    assert relative_to_alexnet({name: 1 - error for name, error in ALEXNET_ERRORS.items()}) == pytest.approx(1)
    assert relative_to_alexnet(dict.fromkeys(CORRUPTIONS, 1.0)) == 0
    one = {name: 1 - error * (name == "brightness") for name, error in ALEXNET_ERRORS.items()}
    assert relative_to_alexnet(one) == pytest.approx(1 / 15), "a mean of shares, not a share of means"
    assert [ALEXNET_ERRORS[name] for name in ("frost", "contrast", "jpeg_compression")] == [0.826572, 0.853204, 0.6065]


def test_unreadable_files_are_named_and_all_of_them_is_an_error(
    files: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    unreadable: list[str] = []
    good = [files.path(row) for row in range(len(files))]
    mixed = with_bad((bad, *good), (0, *files.labels))
    (case,) = file_cases({("snow", 3): mixed}, 16, unreadable, workers=0)
    assert case.labels.tolist() == list(files.labels)
    assert ["bad.png" in line for line in unreadable] == [True]
    with pytest.raises(UserError, match=r"no image of snow at severity 3 can be read; first error: .*bad.png"):
        list(file_cases({("snow", 3): with_bad((bad,), (0,))}, 16, [], workers=0))
    monkeypatch.setattr("coadvise.evaluation.robustness.AT_ONCE", len(files))  # the bad one comes alone, after the rest
    last = with_bad((*good, bad), (*files.labels, 0))
    assert [len(case.labels) for case in file_cases({("snow", 3): last}, 16, [], workers=0)] == [len(files)]
