"""Table 2: the teachers of DeiT and of CiT, their size and accuracy."""

from coadvise.runs.plan import TEACHER
from coadvise.studies.columns import PARAMETERS, TOP1
from coadvise.studies.question import COUNTED, Claim, Row, Study, over


def row(student: str, network: str, parameters: float, top1: float, teacher: str = "", paper_only: bool = False) -> Row:
    return Row(
        f"{student}: {network}",
        (teacher,) if teacher else (),
        role=TEACHER if teacher else COUNTED,
        paper={"parameters": parameters, "top1": top1},
        network=network,
        networks={teacher: network} if teacher else {},
        paper_only=paper_only,
    )


DEIT, TI, S = (
    "DeiT: RegNetY-16GF",
    ("CiT-Ti: RegNetY-600M", "CiT-Ti: RedNet-26"),
    ("CiT-S: RegNetY-4GF", "CiT-S: RedNet-101"),
)

STUDY = Study(
    "Table 2: the teachers of DeiT and of CiT",
    "ImageNet-1k",
    [
        row("DeiT", "RegNetY-16GF", 84, 82.9),
        row("CiT-Ti", "RegNetY-600M", 6, 74.0, "conv", paper_only=True),
        row("CiT-Ti", "RedNet-26", 9, 76.0, "inv", paper_only=True),
        row("CiT-S", "RegNetY-4GF", 21, 79.9, "conv"),
        row("CiT-S", "RedNet-101", 26, 79.0, "inv"),
    ],
    [
        *(
            Claim(
                f"both teachers of {student} together have fewer parameters than DeiT's teacher",
                "4.2",
                {DEIT: 1, conv: -1, inv: -1},
                PARAMETERS.name,
            )
            for student, (conv, inv) in (("CiT-Ti", TI), ("CiT-S", S))
        ),
        *(
            Claim(f"DeiT's teacher is more accurate than {name.replace(': ', ' has with ')}", "4.2", over(DEIT, name))
            for name in (*TI, *S)
        ),
    ],
    [PARAMETERS, TOP1],
)
