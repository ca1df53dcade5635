"""Table 8: stems of either inductive bias, without distillation.

Without distillation every token learns from the labels, as in Table 9, which shares these students.
"""

from coadvise.runs.plan import ADVISED, ALONE
from coadvise.studies.networks import STUDENT
from coadvise.studies.question import LABELS, Claim, Row, Study, aligned, over

STEMS = {"no stem": (), "convolution stem": ("conv",), "involution stem": ("inv",), "both stems": ("conv", "inv")}
NONE, CONV, INV, BOTH_STEMS = STEMS

STUDY = Study(
    "Table 8: inductive bias injected by stems",
    "ImageNet-1k",
    [
        *(
            Row(name, changes={**aligned(*tokens), **LABELS}, role=ALONE, paper={"top1": top1})
            for (name, tokens), top1 in zip(STEMS.items(), (79.8, 81.5, 81.4, 81.8), strict=True)
        ),
        *(
            Row(f"{name}, advised", changes=aligned(*tokens), role=ADVISED, beyond=True)
            for name, tokens in STEMS.items()
        ),
    ],
    [
        Claim("a convolution stem helps", "4.4", over(CONV, NONE)),
        Claim("an involution stem helps", "4.4", over(INV, NONE)),
        Claim("an involution stem helps beside a convolution stem", "4.4", over(BOTH_STEMS, CONV)),
        Claim("a convolution stem helps beside an involution stem", "4.4", over(BOTH_STEMS, INV)),
    ],
    networks={"conv": "RegNetY-4GF", "inv": "RedNet-101", STUDENT: "Transformer-S"},
)
