"""Table 3: parameters, throughput and accuracy of 18 networks."""

from typing import Any

from coadvise.runs.plan import ALONE, TEACHER
from coadvise.studies.columns import PARAMETERS, SPEED
from coadvise.studies.columns import TOP1 as ACCURACY
from coadvise.studies.networks import STUDENT
from coadvise.studies.question import BOTH, COUNTED, ONE_TOKEN, RANDOM, Claim, Row, Study, aligned, over


def row(name: str, parameters: float, speed: float, top1: float, network: str = "", **how: Any) -> Row:
    """A line of the table; counted and timed only, if `how` does not say how it is trained."""
    paper = {PARAMETERS.name: parameters, SPEED.name: speed, ACCURACY.name: top1}
    return Row(name, paper=paper, network=network or name, **(how or {"role": COUNTED, "teachers": ()}))


TINY = {"conv": "RegNetY-600M", "inv": "RedNet-26", STUDENT: "CiT-Ti"}

STUDY = Study(
    "Table 3: networks, their size, speed and accuracy",
    "ImageNet-1k",
    [
        row("ResNet-50", 25.6, 1349.4, 76.2),
        row("ResNet-101", 44.5, 799.4, 77.4),
        row(
            "RegNetY-600MF",
            6.1,
            1200.5,
            75.5,
            "RegNetY-600M",
            teachers=("conv",),
            role=TEACHER,
            networks=TINY,
            paper_only=True,
        ),
        row("RegNetY-4.0GF", 20.6, 350.5, 79.4, "RegNetY-4GF", teachers=("conv",), role=TEACHER),
        row("RegNetY-8.0GF", 39.2, 220.5, 79.9, "RegNetY-8GF"),
        row("RedNet-26", 9.2, 1820.9, 73.6, teachers=("inv",), role=TEACHER, networks=TINY, paper_only=True),
        row("RedNet-50", 15.5, 1066.8, 78.4),
        row("RedNet-101", 25.6, 657.4, 79.1, teachers=("inv",), role=TEACHER),
        row("RedNet-152", 34.0, 459.3, 79.3),
        row("ViT-B/16", 86, 166.88, 77.9),
        row("ViT-L/16", 307, 54.4, 76.5),
        row("DeiT-Ti", 5.0, 3082.9, 72.2, changes={**RANDOM, **ONE_TOKEN}, role=ALONE, networks=TINY, paper_only=True),
        row("DeiT-S", 22, 1562.0, 79.8, changes={**RANDOM, **ONE_TOKEN}, role=ALONE),
        row("DeiT-Ti-KD", 6.0, 3060.8, 74.5),
        row("DeiT-S-KD", 22, 1546.1, 81.2, teachers=("conv",), changes=RANDOM),
        row("CiT-Ti", 6.0, 3053.0, 75.3, changes=RANDOM, networks=TINY, paper_only=True),
        row("CiT-S", 22, 1564.1, 82.0, changes=RANDOM),
        row("CiT-SAK", 26, 1414.1, 82.7, changes=aligned(*BOTH)),
    ],
    [
        Claim(
            "the small convolution network RegNetY-600MF is more accurate than CiT-Ti",
            "4.2",
            over("RegNetY-600MF", "CiT-Ti"),
        ),
        *(
            Claim(f"CiT-Ti is more accurate than {other}", "4.2", over("CiT-Ti", other))
            for other in ("DeiT-Ti", "DeiT-Ti-KD")
        ),
        *(
            Claim(f"CiT-S is more accurate than {other}", "4.2", over("CiT-S", other))
            for other in ("RegNetY-4.0GF", "RedNet-101", "ResNet-50", "DeiT-S", "DeiT-S-KD", "ViT-B/16", "ViT-L/16")
        ),
        *(
            Claim(
                f"{other} has about {times} times the parameters of CiT-S (at least {least})",
                "4.2",
                {other: 1, "CiT-S": -least},
                PARAMETERS.name,
            )
            for other, times, least in (("ViT-B/16", 4, 3.5), ("ViT-L/16", 15, 13))
        ),
        *(
            Claim(
                f"CiT-{size} is about as fast as DeiT-{size}-KD (at least 95 % of its speed)",
                "4.2",
                {f"CiT-{size}": 1, f"DeiT-{size}-KD": -0.95},
                SPEED.name,
            )
            for size in ("Ti", "S")
        ),
        Claim("token alignment makes CiT-S more accurate", "1, Figure 1", over("CiT-SAK", "CiT-S")),
    ],
    [PARAMETERS, SPEED, ACCURACY],
    networks={"conv": "RegNetY-4GF", "inv": "RedNet-101", STUDENT: "CiT-S"},
    notes=("DeiT-S-KD learns from the conv teacher here; the paper's figure is by RegNetY-16GF.",),
)
