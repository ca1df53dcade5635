"""Table 1: teachers of different inductive bias, on images like those they learnt from and on others.

The paper's claim is that they differ (studies/knowledge.py), not which is better where, so there is no order here.
"""

from coadvise.runs.plan import TEACHER
from coadvise.studies.columns import CORRUPTION_ERROR, PARAMETERS, TOP1
from coadvise.studies.question import Row, Study

STUDY = Study(
    "Table 1: teachers of different inductive bias under distribution shift",
    [Row("conv teacher", ("conv",), role=TEACHER), Row("inv teacher", ("inv",), role=TEACHER)],
    columns=[PARAMETERS, TOP1, CORRUPTION_ERROR],
)
