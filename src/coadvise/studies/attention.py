"""Where tokens look: the overlap of two tokens' maps under teachers of two kinds, and of one kind twice.

The paper says that models of different inductive bias focus on diverse patterns. Judged as: in the last block the maps
of two tokens share less if their teachers are of two kinds. The students are those of Table 6.
"""

from coadvise.studies.columns import TOP1, overlap_of_tokens
from coadvise.studies.question import BOTH, RANDOM, Claim, Row, Study, aligned, over

TWO_KINDS = "ResNet-18 + RedNet-26"
NOTE = (
    "Overlap: the share of two tokens' attention over the patches that is the same, mean over at most 250 scored "
    "pictures; last: of the last block; rollout: through all blocks."
)

STUDY = Study(
    "The abstract's claim: tokens of two kinds focus on diverse patterns",
    "",
    [
        Row(TWO_KINDS, BOTH, RANDOM),
        Row("two ResNet-18", ("conv", "conv2"), RANDOM),
        Row("two RedNet-26", ("inv", "inv2"), RANDOM),
        Row(f"{TWO_KINDS}, tokens aligned", BOTH, aligned(*BOTH), beyond=True),
    ],
    [
        Claim(
            f"tokens of two kinds share less than those of {same}", "abstract, 1", over(same, TWO_KINDS), "overlap_last"
        )
        for same in ("two ResNet-18", "two RedNet-26")
    ],
    [TOP1, overlap_of_tokens("last", "overlap, last"), overlap_of_tokens("rollout", "overlap, rollout", NOTE)],
)
