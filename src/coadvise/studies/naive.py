"""Table 6: two teachers of different inductive bias, against two of the same, and against one token for both.

Tokens are not aligned: two teachers of one kind would share their kind of stem.
"""

from coadvise.studies.question import BOTH, NAIVE, RANDOM, Order, Row, Study

STUDY = Study(
    "Table 6: naive multi-teacher distillation against cross inductive bias",
    [
        Row("conv + conv, a token each", ("conv", "conv2"), RANDOM),
        Row("inv + inv, a token each", ("inv", "inv2"), RANDOM),
        Row("conv + inv, both on the class token, summed", BOTH, NAIVE),
        Row("conv + inv, both on the class token, their mean", BOTH, {**NAIVE, "student.combine": "mean"}),
        Row("conv + inv, a token each", BOTH, RANDOM),
    ],
    [
        Order("conv + inv, a token each", "conv + conv, a token each"),
        Order("conv + inv, a token each", "inv + inv, a token each"),
        Order("conv + inv, a token each", "conv + inv, both on the class token, summed"),
        Order("conv + inv, a token each", "conv + inv, both on the class token, their mean"),
    ],
)
