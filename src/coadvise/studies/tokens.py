"""Table 7: which tokens, each advised by its teacher, make the student better."""

from typing import Any

from coadvise.run import ALONE
from coadvise.studies.question import Order, Row, Study

RANDOM: dict[str, Any] = {"student.model_kwargs.aligned": {}}

STUDY = Study(
    "Table 7: what each token adds (tokens not aligned)",
    [
        Row("class token alone", changes=RANDOM, role=ALONE),
        Row("class + conv token", ("conv",), RANDOM),
        Row("class + inv token", ("inv",), RANDOM),
        Row("class + conv + inv token", ("conv", "inv"), RANDOM),
    ],
    [
        Order("class + conv token", "class token alone"),
        Order("class + inv token", "class token alone"),
        Order("class + conv + inv token", "class + conv token"),
        Order("class + conv + inv token", "class + inv token"),
    ],
)
