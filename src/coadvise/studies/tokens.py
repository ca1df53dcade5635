"""Table 7: what each token, advised by its teacher, adds to the student."""

from coadvise.runs.plan import ALONE
from coadvise.studies.question import BOTH, RANDOM, Order, Row, Study

STUDY = Study(
    "Table 7: what each token adds (tokens not aligned)",
    [
        Row("class token alone", changes=RANDOM, role=ALONE),
        Row("class + conv token", ("conv",), RANDOM),
        Row("class + inv token", ("inv",), RANDOM),
        Row("class + conv + inv token", BOTH, RANDOM),
    ],
    [
        Order("class + conv token", "class token alone"),
        Order("class + inv token", "class token alone"),
        Order("class + conv + inv token", "class + conv token"),
        Order("class + conv + inv token", "class + inv token"),
    ],
)
