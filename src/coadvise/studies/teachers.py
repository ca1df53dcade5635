"""Table 1: teachers of different inductive bias, on images like their training images and under distribution shift.

The paper claims that they differ (studies/knowledge.py), not which one is better, so no claim is judged here.
"""

from coadvise.runs.plan import TEACHER
from coadvise.studies.columns import CORRUPTION_ERROR, PARAMETERS, TOP1
from coadvise.studies.question import Row, Study

STUDY = Study(
    "Table 1: teachers of different inductive bias under distribution shift",
    [Row("conv teacher", ("conv",), role=TEACHER), Row("inv teacher", ("inv",), role=TEACHER)],
    columns=[PARAMETERS, TOP1, CORRUPTION_ERROR],
)
