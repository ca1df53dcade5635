"""Table 8: random and aligned tokens, with and without advice."""

from coadvise.runs.plan import ALONE
from coadvise.studies.question import BOTH, RANDOM, Order, Row, Study, aligned

STUDY = Study(
    "Table 8: how inductive bias is injected into the tokens",
    [
        Row("random tokens, no advice", changes=RANDOM, role=ALONE),
        Row("both aligned, no advice", changes=aligned(*BOTH), role=ALONE),
        Row("random tokens, advised", BOTH, RANDOM),
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
