"""Figure 4: a teacher's accuracy, varied by its epochs and its size, against that of the student it advises alone.

The paper claims (abstract) that the accuracy of a teacher is not the main reason for that of its student. Judged as:
when a teacher gains by longer training or by size, its student gains only a part of that.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from coadvise.config import RunConfig
from coadvise.errors import UserError
from coadvise.studies.columns import ABOVE_TEACHER, TEACHER_TOP1, TOP1
from coadvise.studies.question import RANDOM, Figure, Order, Row, Study, must_train

FAMILIES = (
    ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    ("resnet26", "resnet50"),
    ("rednet26", "rednet50", "rednet101", "rednet152"),
    ("regnety_002", "regnety_004", "regnety_006", "regnety_040", "regnety_080", "regnety_160"),
)
LARGER = {model: larger for family in FAMILIES for model, larger in pairwise(family)}
AGAIN = "itself, with fewer epochs and with more blocks"
DEPTHS = {"resnet_small": (1, 1, 1), "rednet_small": (1, 2, 2)}  # the defaults; a larger one has twice as many


def epochs(kind: str, share: float) -> Callable[[RunConfig], Mapping[str, Any]]:
    """Changes that give the teacher a share of its epochs, of the warm-up too."""

    def changes(config: RunConfig) -> Mapping[str, Any]:
        recipe, where = must_train(kind, config, AGAIN).recipe, f"teachers.{kind}.recipe"
        return {
            **RANDOM,
            f"{where}.epochs": max(1, round(share * recipe.epochs)),
            f"{where}.warmup_epochs": share * recipe.warmup_epochs,
        }

    return changes


def larger(kind: str) -> Callable[[RunConfig], Mapping[str, Any]]:
    """Changes that give the next larger teacher."""

    def changes(config: RunConfig) -> Mapping[str, Any]:
        teacher, where = must_train(kind, config, AGAIN), f"teachers.{kind}"
        if teacher.model in DEPTHS:
            depths: Any = teacher.model_kwargs.get("depths", DEPTHS[teacher.model])
            return {**RANDOM, f"{where}.model_kwargs.depths": [2 * blocks for blocks in depths]}
        if teacher.model not in LARGER:
            raise UserError(
                f"{where}.model={teacher.model}: this study knows no larger model of this kind; choose one of "
                f"{', '.join([*DEPTHS, *LARGER])}"
            )
        return {**RANDOM, f"{where}.model": LARGER[teacher.model]}

    return changes


STUDY = Study(
    "Figure 4: a teacher's accuracy, by epochs and size, against its student's (tokens not aligned)",
    [
        row
        for kind in ("conv", "inv")
        for row in (
            Row(f"{kind} teacher, 1/4 of its epochs", (kind,), epochs(kind, 1 / 4)),
            Row(f"{kind} teacher, 1/2 of its epochs", (kind,), epochs(kind, 1 / 2)),
            Row(f"{kind} teacher, all its epochs", (kind,), RANDOM),
            Row(f"{kind} teacher, larger", (kind,), larger(kind)),
        )
    ],
    [
        Order(f"{kind} teacher, {worse}", f"{kind} teacher, {better}", ABOVE_TEACHER.name)
        for kind in ("conv", "inv")
        for worse, better in (("1/4 of its epochs", "all its epochs"), ("all its epochs", "larger"))
    ],
    columns=[TEACHER_TOP1, TOP1, ABOVE_TEACHER],
    figure=Figure(TEACHER_TOP1.name, TOP1.name),
)
