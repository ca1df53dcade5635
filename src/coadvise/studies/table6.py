"""Table 6: two teachers of different inductive bias, against one teacher and against two of the same bias."""

from coadvise.runs.plan import ALONE, TEACHER
from coadvise.studies.question import BOTH, ONE_TOKEN, RANDOM, Changes, Claim, Row, Study, aligned, over

ALONE_ROW, BOTH_ROW = "Transformer-Ti, no teacher", "Transformer-Ti, ResNet-18 + RedNet-26"
SINGLE = {"ResNet-18": ("conv", 86.5), "ResNet-50": ("conv50", 86.6), "RedNet-26": ("inv", 85.0)}
SAME_BIAS = ("Transformer-Ti, two ResNet-18", "Transformer-Ti, ResNet-18 + ResNet-50")


def beyond(name: str, teachers: tuple[str, ...], changes: Changes) -> Row:
    return Row(f"Transformer-Ti, {name}", teachers, changes, beyond=True)


STUDY = Study(
    "Table 6: teachers of one inductive bias and of two",
    "ImageNet-100",
    [
        Row("ResNet-18", ("conv",), role=TEACHER, paper={"top1": 85.1}),
        Row("ResNet-50", ("conv50",), role=TEACHER, paper={"top1": 89.0}),
        Row("RedNet-26", ("inv",), role=TEACHER, paper={"top1": 89.2}),
        Row(ALONE_ROW, BOTH, {**RANDOM, **ONE_TOKEN}, ALONE, paper={"top1": 81.8}),
        *(
            Row(f"Transformer-Ti, {name}", (teacher,), RANDOM, paper={"top1": top1})
            for name, (teacher, top1) in SINGLE.items()
        ),
        Row(SAME_BIAS[0], ("conv", "conv2"), RANDOM, paper={"top1": 87.2}),
        Row(SAME_BIAS[1], ("conv", "conv50"), RANDOM, paper={"top1": 87.0}),
        Row(BOTH_ROW, BOTH, RANDOM, paper={"top1": 88.0}),
        beyond("two RedNet-26", ("inv", "inv2"), RANDOM),
        beyond("both on the class token, summed", BOTH, {**RANDOM, **ONE_TOKEN}),
        beyond("both on the class token, their mean", BOTH, {**RANDOM, **ONE_TOKEN, "student.combine": "mean"}),
        beyond("both, tokens aligned", BOTH, aligned(*BOTH)),
    ],
    [
        *(
            Claim(f"{name} alone helps the student", "4.3.3", over(f"Transformer-Ti, {name}", ALONE_ROW))
            for name in SINGLE
        ),
        Claim("ResNet-50 and RedNet-26 are similar", "4.3.3", over("RedNet-26", "ResNet-50"), kind="similar"),
        Claim(
            "students of ResNet-18 and of ResNet-50 are similar, although the teachers differ",
            "1",
            over("Transformer-Ti, ResNet-50", "Transformer-Ti, ResNet-18"),
            kind="similar",
        ),
        Claim("RedNet-26 beside ResNet-18 helps", "4.3.3", over(BOTH_ROW, "Transformer-Ti, ResNet-18")),
        *(
            Claim(f"it helps more than {'a second' if 'two' in other else 'a'} {what}", "4.3.3", over(BOTH_ROW, other))
            for other, what in zip(SAME_BIAS, ("ResNet-18", "ResNet-50"), strict=True)
        ),
    ],
)
