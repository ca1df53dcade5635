"""Table 5: how far each output head of the student is from each teacher."""

from coadvise.studies.columns import kl_to
from coadvise.studies.question import BOTH, RANDOM, Order, Row, Study

STUDY = Study(
    "Table 5: KL divergence of each token from each teacher (tokens not aligned)",
    [
        Row("class token", BOTH, RANDOM),
        Row("conv token", BOTH, RANDOM, answer="conv"),
        Row("inv token", BOTH, RANDOM, answer="inv"),
        Row("average", BOTH, RANDOM, answer="average"),
    ],
    # a token is nearer to the teacher that advises it than the other token is
    [Order("inv token", "conv token", "kl_conv"), Order("conv token", "inv token", "kl_inv")],
    [kl_to("conv"), kl_to("inv")],
)
