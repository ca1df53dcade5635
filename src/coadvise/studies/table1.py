"""Table 1: convolution and involution networks of five sizes, on clean images and under distribution shift."""

from coadvise.runs.plan import TEACHER
from coadvise.studies.columns import CORRUPTION_ERROR, SHIFTED, TOP1
from coadvise.studies.networks import TEACHERS
from coadvise.studies.question import Claim, Row, Study, nearest_pairs, negated

FIGURES = {
    "conv": (68.74, 2.60, 31.90, 65.58),
    "conv34": (72.62, 3.45, 35.17, 60.26),
    "conv50": (75.57, 2.60, 35.61, 59.15),
    "conv101": (77.00, 6.03, 38.77, 54.33),
    "conv152": (77.96, 7.73, 40.72, 53.18),
    "inv": (75.19, 5.49, 33.33, 61.09),
    "inv38": (76.88, 6.88, 34.80, 58.15),
    "inv50": (77.72, 7.64, 35.72, 56.03),
    "inv101": (78.35, 9.03, 36.30, 54.78),
    "inv152": (78.54, 9.24, 36.84, 53.58),
}
NAMES = {teacher: TEACHERS[teacher].paper for teacher in FIGURES}
INVOLUTION_LESS = nearest_pairs(
    [name for name in NAMES.values() if name.startswith("ResNet")],
    [name for name in NAMES.values() if name.startswith("RedNet")],
    TOP1.name,
    most=3,
)
EQUAL = "of three pairs of nearly equal clean accuracy, "

STUDY = Study(
    "Table 1: convolution and involution networks under distribution shift",
    "ImageNet-1k",
    [
        Row(NAMES[teacher], (teacher,), role=TEACHER, paper=dict(zip([c.name for c in SHIFTED], figures, strict=True)))
        for teacher, figures in FIGURES.items()
    ],
    [
        Claim(EQUAL + "convolution networks are better on ImageNet-R", "3.1", INVOLUTION_LESS, "imagenet_r"),
        Claim(
            EQUAL + "convolution networks make fewer errors under corruptions",
            "3.1",
            negated(INVOLUTION_LESS),
            CORRUPTION_ERROR.name,
        ),
        Claim(EQUAL + "involution networks are better on ImageNet-A", "3.1", negated(INVOLUTION_LESS), "imagenet_a"),
    ],
    SHIFTED,
)
