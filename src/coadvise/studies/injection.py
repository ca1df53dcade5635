"""Table 8: tokens as random vectors or aligned, each by itself, with and without advice."""

from typing import Any

from coadvise.run import ALONE
from coadvise.studies.question import Order, Row, Study


def aligned(*tokens: str) -> dict[str, Any]:
    """The configuration in which these tokens come from stems of their own kind."""
    return {"student.model_kwargs.aligned": {token: token for token in tokens}}


BOTH = ("conv", "inv")

STUDY = Study(
    "Table 8: how inductive bias is injected into the tokens",
    [
        Row("random tokens, no advice", changes=aligned(), role=ALONE),
        Row("both aligned, no advice", changes=aligned(*BOTH), role=ALONE),
        Row("random tokens, advised", BOTH, aligned()),
        Row("conv token aligned, advised", BOTH, aligned("conv")),
        Row("inv token aligned, advised", BOTH, aligned("inv")),
        Row("both aligned, advised", BOTH, aligned(*BOTH)),
    ],
    [
        Order("random tokens, advised", "random tokens, no advice"),
        Order("both aligned, advised", "both aligned, no advice"),
        Order("both aligned, advised", "random tokens, advised"),
        Order("both aligned, advised", "conv token aligned, advised"),
        Order("both aligned, advised", "inv token aligned, advised"),
    ],
)
