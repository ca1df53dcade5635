"""Table 9: the co-advised student's tokens, and the student alone, under distribution shift."""

from coadvise.runs.plan import ALONE
from coadvise.studies.columns import CORRUPTION_ERROR, TOP1
from coadvise.studies.question import BOTH, RANDOM, Order, Row, Study

STUDY = Study(
    "Table 9: the tokens under distribution shift (tokens not aligned)",
    [
        Row("student alone", BOTH, RANDOM, ALONE),
        Row("co-advised, class token", BOTH, RANDOM),
        Row("co-advised, conv token", BOTH, RANDOM, answer="conv"),
        Row("co-advised, inv token", BOTH, RANDOM, answer="inv"),
        Row("co-advised, average", BOTH, RANDOM, answer="average"),
    ],
    [
        Order("co-advised, class token", "student alone"),
        Order("student alone", "co-advised, class token", CORRUPTION_ERROR.name),
    ],
    [TOP1, CORRUPTION_ERROR],
)
