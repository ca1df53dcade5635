"""Table 9: the conv and the inv token under distribution shift: random or aligned, without or with distillation.

Without distillation every token learns from the labels, the paper's third kind of teacher (section 3.2).
"""

from coadvise.advice import AVERAGE
from coadvise.runs.plan import ADVISED, ALONE
from coadvise.studies.columns import CORRUPTION_ERROR, SHIFTED, TOP1
from coadvise.studies.networks import STUDENT
from coadvise.studies.question import BOTH, LABELS, RANDOM, Claim, Row, Study, aligned, gains_more, over

A, R, C = "imagenet_a", "imagenet_r", CORRUPTION_ERROR.name
KINDS = {"Random": RANDOM, "Align": aligned(*BOTH)}
FIGURES = {
    ("Random", "w/o KD"): ((79.80, 18.36, 42.35, 41.36), (79.80, 18.35, 42.35, 41.35)),
    ("Random", "w/ KD"): ((81.43, 16.18, 45.08, 39.58), (81.89, 18.80, 44.43, 40.95)),
    ("Align", "w/o KD"): ((81.72, 24.89, 41.88, 38.54), (81.74, 24.88, 41.76, 38.56)),
    ("Align", "w/ KD"): ((82.11, 23.58, 47.41, 38.11), (82.51, 25.15, 46.81, 38.04)),
}


def name(kind: str, advice: str, token: str) -> str:
    return f"{kind} {advice}, {token if token == AVERAGE else f'{token} token'}"


def row(kind: str, advice: str, token: str, **more: object) -> Row:
    changes, role = (KINDS[kind], ADVISED) if advice == "w/ KD" else ({**KINDS[kind], **LABELS}, ALONE)
    return Row(name(kind, advice, token), BOTH, changes, role, token, **more)  # type: ignore[arg-type]


def tokens_differ(kind: str) -> list[Claim]:
    """What holds for the teachers holds for the tokens that they advise."""
    conv, inv = (name(kind, "w/ KD", token) for token in BOTH)
    tokens = "aligned" if kind == "Align" else "random"
    return [
        Claim(
            f"advised, {tokens}: the conv token is better on ImageNet-R than the inv token", "4.4", over(conv, inv), R
        ),
        Claim(f"advised, {tokens}: the conv token makes fewer errors under corruptions", "4.4", over(inv, conv), C),
        Claim(
            f"advised, {tokens}: the conv token is worse on ImageNet-A than the inv token", "4.4", over(inv, conv), A
        ),
    ]


def tokens_alike(kind: str) -> list[Claim]:
    conv, inv = (name(kind, "w/o KD", token) for token in BOTH)
    tokens = "aligned" if kind == "Align" else "random"
    return [
        Claim(
            f"not advised, {tokens}: conv and inv token are similar on {what}",
            "4.4",
            over(conv, inv),
            column,
            "similar",
        )
        for what, column in (("ImageNet-A", A), ("ImageNet-R", R), ("corruptions", C))
    ]


def distillation_tells_them_apart() -> list[Claim]:
    """Conv and inv token differ as their teachers do, and more so by distillation alone than by stems alone."""
    (conv, inv), (conv_stem, inv_stem) = (
        tuple(name(kind, advice, token) for token in BOTH)
        for kind, advice in (("Random", "w/ KD"), ("Align", "w/o KD"))
    )
    by_conv, by_inv = gains_more((conv, inv), (conv_stem, inv_stem)), gains_more((inv, conv), (inv_stem, conv_stem))
    return [
        Claim(f"on {what}, tokens differ as their teachers do, by distillation more than by stems", "4.4", rows, column)
        for what, rows, column in (("ImageNet-A", by_inv, A), ("ImageNet-R", by_conv, R), ("corruptions", by_inv, C))
    ]


STUDY = Study(
    "Table 9: tokens under distribution shift, without and with distillation and alignment",
    "ImageNet-1k",
    [
        *(
            row(kind, advice, token, paper=dict(zip([column.name for column in SHIFTED], figures, strict=True)))
            for (kind, advice), both in FIGURES.items()
            for token, figures in zip(BOTH, both, strict=True)
        ),
        *(
            row(kind, advice, token, beyond=True)
            for kind, advice in FIGURES
            for token in ("class", *([AVERAGE] if advice == "w/ KD" else []))
        ),
    ],
    [
        *tokens_alike("Random"),
        *tokens_alike("Align"),
        *tokens_differ("Random"),
        *tokens_differ("Align"),
        *distillation_tells_them_apart(),
        *(
            Claim(
                f"distillation helps the {token} token, tokens {kind.lower()}{'ed' if kind == 'Align' else ''}",
                "4.4",
                over(name(kind, "w/ KD", token), name(kind, "w/o KD", token)),
                TOP1.name,
            )
            for kind in KINDS
            for token in BOTH
        ),
        *(
            Claim(
                f"with distillation, alignment helps the {token} token",
                "4.4",
                over(name("Align", "w/ KD", token), name("Random", "w/ KD", token)),
                TOP1.name,
            )
            for token in BOTH
        ),
    ],
    SHIFTED,
    networks={"conv": "RegNetY-4GF", "inv": "RedNet-101", STUDENT: "Transformer-S"},
)
