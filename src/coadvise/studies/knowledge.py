"""The abstract's claim: teachers of different inductive bias learn different things from the same images.

Read so: a teacher's answers are those of another of its kind, trained from another seed, more often than those of the
other kind. Accuracy by itself favours one of the two orders and is against the other, since the more accurate kind is
the more likely to agree with anyone.
"""

from collections.abc import Callable, Mapping
from typing import Any

from coadvise.config import RunConfig
from coadvise.runs.plan import TEACHER
from coadvise.studies.columns import TOP1, same_answer
from coadvise.studies.question import Order, Row, Study, must_train


def unchanged(kind: str) -> Callable[[RunConfig], Mapping[str, Any]]:
    """The configuration as it is, if another such teacher can be trained."""

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
