"""The abstract's claim: teachers of different inductive bias learn different things from the same images.

Judged as: a teacher's predictions agree more often with those of a second teacher of its kind, trained from another
seed, than with those of the other kind. Accuracy alone would favour one of the two claims and oppose the other, since
the more accurate kind agrees more with any network.
"""

from coadvise.runs.plan import TEACHER
from coadvise.studies.columns import TOP1, same_answer
from coadvise.studies.question import Claim, Row, Study, over

STUDY = Study(
    "The abstract's claim: teachers of different inductive bias learn different things",
    "",
    [
        Row("ResNet-18", ("conv",), role=TEACHER),
        Row("another ResNet-18", ("conv2",), role=TEACHER),
        Row("RedNet-26", ("inv",), role=TEACHER),
        Row("another RedNet-26", ("inv2",), role=TEACHER),
    ],
    [
        Claim(
            f"{one} answers as {another} does more often than as {other} does",
            "abstract",
            over(another, other),
            f"same_as_{kind}",
        )
        for kind, one, another, other in (
            ("conv", "ResNet-18", "another ResNet-18", "RedNet-26"),
            ("inv", "RedNet-26", "another RedNet-26", "ResNet-18"),
        )
    ],
    [TOP1, same_answer("conv", "ResNet-18"), same_answer("inv", "RedNet-26")],
)
