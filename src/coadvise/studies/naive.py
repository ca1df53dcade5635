"""Table 6: teachers of different inductive bias against as many of the same, and against one token for both."""

from typing import Any

from coadvise.studies.question import Order, Row, Study

RANDOM: dict[str, Any] = {"student.model_kwargs.aligned": {}}  # two teachers of one kind would have one kind of stem
CLASS = {**RANDOM, "teachers.conv.token": "class", "teachers.inv.token": "class"}

STUDY = Study(
    "Table 6: naive multi-teacher distillation against cross inductive bias",
    [
        Row("conv + conv, a token each", ("conv", "conv2"), RANDOM),
        Row("inv + inv, a token each", ("inv", "inv2"), RANDOM),
        Row("conv + inv, both on the class token, summed", ("conv", "inv"), CLASS),
        Row("conv + inv, both on the class token, their mean", ("conv", "inv"), {**CLASS, "student.combine": "mean"}),
        Row("conv + inv, a token each", ("conv", "inv"), RANDOM),
    ],
    [
        Order("conv + inv, a token each", "conv + conv, a token each"),
        Order("conv + inv, a token each", "inv + inv, a token each"),
        Order("conv + inv, a token each", "conv + inv, both on the class token, summed"),
        Order("conv + inv, a token each", "conv + inv, both on the class token, their mean"),
    ],
)
