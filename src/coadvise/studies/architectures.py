"""Table 3: cost and accuracy of each architecture. The paper's figures are those of its S models."""

from coadvise.runs.plan import ALONE, TEACHER
from coadvise.studies.columns import PARAMETERS, SPEED, TOP1
from coadvise.studies.question import BOTH, NAIVE, RANDOM, Order, Row, Study, aligned

STUDY = Study(
    "Table 3: architectures, their size, speed and accuracy (the paper's: DeiT-S, distilled DeiT-S, CiT-S, CiT-SAK)",
    [
        Row("conv teacher", ("conv",), role=TEACHER),
        Row("inv teacher", ("inv",), role=TEACHER),
        Row(
            "plain transformer, alone",
            BOTH,
            NAIVE,
            ALONE,
            paper={"parameters": "22", "top1": "79.8"},
        ),
        Row("one token, conv teacher", ("conv",), RANDOM, paper={"parameters": "22", "top1": "81.2"}),
        Row("conv + inv token, both teachers", BOTH, RANDOM, paper={"parameters": "22", "top1": "82.0"}),
        Row("both tokens aligned, both teachers", BOTH, aligned(*BOTH), paper={"parameters": "26", "top1": "82.7"}),
    ],
    [
        Order("one token, conv teacher", "plain transformer, alone"),
        Order("conv + inv token, both teachers", "one token, conv teacher"),
        Order("both tokens aligned, both teachers", "conv + inv token, both teachers"),
    ],
    [PARAMETERS, SPEED, TOP1],
)
