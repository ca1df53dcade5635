"""Table 5: how far three students of both teachers are from each teacher."""

from coadvise.studies.columns import TOP1, kl_to
from coadvise.studies.question import RANDOM, Claim, Row, Study, over
from coadvise.studies.table4 import mixer, resnet10

CONV, INV = kl_to("conv", "ResNet-18"), kl_to("inv", "RedNet-26")


def paper(conv: float, inv: float, top1: float) -> dict[str, float]:
    return {CONV.name: conv, INV.name: inv, TOP1.name: top1}


RESNET, MIXER, CONV_TOKEN, INV_TOKEN = "ResNet-10", "Mixer-Ti", "CiT-Ti conv token", "CiT-Ti inv token"

STUDY = Study(
    "Table 5: KL divergence of students from their teachers",
    "ImageNet-100",
    [
        Row(RESNET, changes=resnet10({}), paper=paper(0.261, 0.274, 83.4)),
        Row(MIXER, changes=mixer({}), paper=paper(0.358, 0.313, 82.3)),
        Row(CONV_TOKEN, changes=RANDOM, answer="conv", paper=paper(0.255, 0.290, 87.1)),
        Row(INV_TOKEN, changes=RANDOM, answer="inv", paper=paper(0.254, 0.154, 87.7)),
        Row("CiT-Ti class token", changes=RANDOM, beyond=True),
        Row("CiT-Ti average", changes=RANDOM, answer="average", beyond=True),
    ],
    [
        *(
            Claim(f"Mixer-Ti is farther from {teacher} than {other}", "4.3.2", over(MIXER, other), column.name)
            for column, teacher, others in (
                (CONV, "ResNet-18", (RESNET, CONV_TOKEN, INV_TOKEN)),
                (INV, "RedNet-26", (RESNET, CONV_TOKEN, INV_TOKEN)),
            )
            for other in others
        ),
        *(
            Claim(f"the {token} is nearer to {teacher} than {RESNET} is", "4.3.2", over(RESNET, row), column.name)
            for column, teacher in ((CONV, "ResNet-18"), (INV, "RedNet-26"))
            for token, row in (("conv token", CONV_TOKEN), ("inv token", INV_TOKEN))
        ),
        Claim(
            "the conv token is nearer to ResNet-18 than the inv token is",
            "4.3.2",
            over(INV_TOKEN, CONV_TOKEN),
            CONV.name,
        ),
        Claim(
            "the inv token is nearer to RedNet-26 than the conv token is",
            "4.3.2",
            over(CONV_TOKEN, INV_TOKEN),
            INV.name,
        ),
    ],
    [CONV, INV, TOP1],
    notes=("ResNet-10 and Mixer-Ti are scored by the output that learns from the labels.",),
)
