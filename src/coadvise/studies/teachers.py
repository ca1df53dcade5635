"""Table 1: teachers of different inductive bias, on images like those they learnt from and on others.

The paper's claim is not which is better where, but that such teachers learn different things from the same images. So
each has beside it another of its kind, from another seed, which the paper's table has not: a teacher's answers should
be those of its like more often than those of the other kind. Accuracy by itself favours one of these two orders and is
against the other, since the more accurate kind is the more likely to agree with anyone.
"""

from coadvise.run import TEACHER
from coadvise.studies.columns import CORRUPTION_ERROR, PARAMETERS, TOP1, same_answer
from coadvise.studies.question import Order, Row, Study

STUDY = Study(
    "Table 1: teachers of different inductive bias under distribution shift",
    [
        Row("conv teacher", ("conv",), role=TEACHER),
        Row("inv teacher", ("inv",), role=TEACHER),
        Row("another conv teacher", ("conv2",), role=TEACHER),
        Row("another inv teacher", ("inv2",), role=TEACHER),
    ],
    [
        Order("another conv teacher", "inv teacher", "same_as_conv"),
        Order("another inv teacher", "conv teacher", "same_as_inv"),
    ],
    [PARAMETERS, TOP1, CORRUPTION_ERROR, same_answer("conv"), same_answer("inv")],
)
