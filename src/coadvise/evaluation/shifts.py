"""Data sets with a distribution shift: ImageNet-A, ImageNet-R and ImageNet-C, as their archives unpack."""

from coadvise import torchvision_guard  # noqa: F401  # isort: skip  (before anything that imports torchvision)

import os
import pkgutil
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from coadvise.config.schema import DataConfig
from coadvise.data.sources import Split, evaluation_split
from coadvise.errors import UserError
from coadvise.evaluation.corruptions import CORRUPTIONS, SEVERITIES

FOLDER, IMAGENET_A, IMAGENET_R, IMAGENET_C = "folder", "imagenet-a", "imagenet-r", "imagenet-c"
NEARLY_ALL = 180  # of 200 classes
LAYOUTS = (FOLDER, IMAGENET_A, IMAGENET_R, IMAGENET_C)


def layout_of(root: str | Path) -> str:
    """Recognises a folder by the names in it. ImageNet-A and -R need all of their 200 classes and no other of ImageNet.

    Raises:
        UserError: nearly all of the 200 classes, which means an incomplete copy.
    """
    names = set(_folders(Path(root)))
    if any((Path(root) / name / str(severity)).is_dir() for name in names & {*CORRUPTIONS} for severity in SEVERITIES):
        return IMAGENET_C
    synsets = {name for name in names if re.fullmatch(r"n\d{8}", name)}
    for layout in (IMAGENET_A, IMAGENET_R):
        if len(synsets) >= NEARLY_ALL and synsets <= {*subset(layout)}:
            _check_complete(Path(root), layout)
            return layout
    return FOLDER


@cache
def subset(layout: str) -> tuple[str, ...]:
    """The 200 classes of ImageNet-A or ImageNet-R as WordNet ids, from timm's lists."""
    listed = pkgutil.get_data("timm.data", f"_info/{layout.replace('-', '_')}_synsets.txt")
    assert listed is not None
    return tuple(sorted(listed.decode().split()))


def subset_split(root: str | Path, layout: str, known: Sequence[str]) -> Split:
    """The images of ImageNet-A or -R, labels in the order of `subset(layout)`.

    Args:
        known: the classes of the networks.

    Raises:
        UserError: the folder does not exist or lacks classes, or the networks do not know them.
    """
    classes = subset(layout)
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise UserError(
            f"the run's networks do not know {len(unknown)} of the 200 classes of {layout}, for instance "
            f"'{unknown[0]}'; train on ImageNet-1k with classes named by WordNet ids"
        )
    if Path(root).is_dir():
        _check_complete(Path(root), layout)
    return evaluation_split(root, classes, DataConfig(classes=classes))


def _check_complete(root: Path, layout: str) -> None:
    """Raises UserError naming missing classes of ImageNet-A or -R."""
    missing = sorted({*subset(layout)} - {*_folders(root)})
    if missing:
        raise UserError(
            f"'{root}' lacks {len(missing)} of the 200 classes of {layout}: {', '.join(missing[:5])}"
            + (" and others" if len(missing) > 5 else "")
            + f"; unpack it again, or use 'coadvise evaluate --layout {FOLDER}' to score on the images that are there"
        )


def corrupted_splits(
    root: str | Path, classes: Sequence[str], how: DataConfig | None = None
) -> dict[tuple[str, int], Split]:
    """The images of ImageNet-C by corruption and severity, from ROOT/CORRUPTION/SEVERITY/CLASS/IMAGE.

    Args:
        classes, how: as for `evaluation_split`.

    Raises:
        UserError: a corruption or severity is missing, or the networks do not know a class.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"data folder '{root}' does not exist; give the folder of ImageNet-C that holds gaussian_noise/"
        )
    absent = [name for name in CORRUPTIONS if not (root / name).is_dir()]
    absent += [
        f"{name}/{severity}"
        for name in CORRUPTIONS
        for severity in SEVERITIES
        if name not in absent and not (root / name / str(severity)).is_dir()
    ]
    if absent:
        raise UserError(
            f"'{root}' lacks {', '.join(absent)} of ImageNet-C; the mean corruption error needs all 15 "
            f"corruptions at severities 1 to 5; unpack the missing ones there"
        )
    return {
        (name, severity): evaluation_split(root / name / str(severity), classes, how)
        for name in CORRUPTIONS
        for severity in SEVERITIES
    }


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
