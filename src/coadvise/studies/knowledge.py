"""The abstract's claim: teachers of different inductive bias learn different things from the same images.

Judged as: a teacher's predictions agree more often with those of a second teacher of its kind, trained from another
seed, than with those of the other kind. Accuracy alone would favour one of the two claims and oppose the other, since
the more accurate kind agrees more with any network.
"""

from collections.abc import Callable, Mapping
from typing import Any

from coadvise.config import RunConfig
from coadvise.runs.plan import TEACHER
from coadvise.studies.columns import TOP1, same_answer
from coadvise.studies.question import Order, Row, Study, must_train


def unchanged(kind: str) -> Callable[[RunConfig], Mapping[str, Any]]:
    """No changes. Raises UserError unless a second such teacher can be trained."""

    def changes(config: RunConfig) -> Mapping[str, Any]:
        must_train(kind, config, "twice, from two seeds")
        return {}

    return changes


STUDY = Study(
    "The abstract's claim: teachers of different inductive bias learn different things",
    [
        Row("conv teacher", ("conv",), unchanged("conv"), TEACHER),
        Row("another conv teacher", ("conv2",), role=TEACHER),
        Row("inv teacher", ("inv",), unchanged("inv"), TEACHER),
        Row("another inv teacher", ("inv2",), role=TEACHER),
    ],
    [
        Order("another conv teacher", "inv teacher", "same_as_conv"),
        Order("another inv teacher", "conv teacher", "same_as_inv"),
    ],
    [TOP1, same_answer("conv"), same_answer("inv")],
)
