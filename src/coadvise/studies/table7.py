"""Table 7: one token for labels and teachers, against a token each."""

from coadvise.runs.plan import ADVISED, ALONE
from coadvise.studies.question import BOTH, ONE_TOKEN, RANDOM, Claim, Row, Study, over


def one_token(teachers: tuple[str, ...], top1: float, name: str, role: str = ADVISED) -> Row:
    tokens = {f"teachers.{teacher}.token": "class" for teacher in teachers}
    return Row(f"1 token, {name}", teachers, {**RANDOM, **tokens}, role, paper={"top1": top1})


NONE, CONV, INV, TWO, THREE = (
    "1 token, no teacher", "1 token, ResNet-18", "1 token, RedNet-26", "1 token, ResNet-18 + RedNet-26",
    "3 tokens, ResNet-18 + RedNet-26",
)  # fmt: skip

STUDY = Study(
    "Table 7: one token for all, against a token for each teacher",
    "ImageNet-100",
    [
        one_token(BOTH, 81.8, "no teacher", ALONE),
        one_token(("conv",), 81.9, "ResNet-18"),
        one_token(("inv",), 80.7, "RedNet-26"),
        one_token(BOTH, 83.5, "ResNet-18 + RedNet-26"),
        Row(THREE, BOTH, RANDOM, paper={"top1": 88.0}),
        Row("1 token, both, their mean", BOTH, {**RANDOM, **ONE_TOKEN, "student.combine": "mean"}, beyond=True),
    ],
    [
        Claim("on one token, both teachers help", "4.3.4", over(TWO, NONE)),
        Claim("on one token, ResNet-18 alone hardly changes anything", "4.3.4", over(CONV, NONE), kind="similar"),
        Claim("on one token, RedNet-26 alone hardly changes anything", "4.3.4", over(INV, NONE), kind="similar"),
        Claim("with the same teachers, three tokens are better than one", "4.3.4", over(THREE, TWO)),
    ],
)
