"""Table 4: students of other inductive bias, advised by one teacher or by both.

All three students use the preset's recipe; its model arguments are for the transformer only.
"""

from collections.abc import Callable, Mapping
from typing import Any

from coadvise.config.schema import RunConfig, sides
from coadvise.runs.plan import ADVISED, ALONE
from coadvise.studies.networks import SMALL_IMAGES
from coadvise.studies.question import BOTH, ONE_TOKEN, RANDOM, Changes, Claim, Row, Study, gains_more, over

# Up to SMALL_IMAGES: as small as the micro student, at full resolution for longer.
SMALL_RESNET10 = {"widths": [24, 48, 96, 192], "stem_kernel": 3, "stem_stride": 1, "stem_pool": False}
SMALL_MIXER = {"patch_size": 4, "num_blocks": 6, "embed_dim": 96}
TEACHERS = {"no teacher": BOTH, "ResNet-18": ("conv",), "RedNet-26": ("inv",), "ResNet-18 + RedNet-26": BOTH}


def student(model: str, small: Mapping[str, Any], changes: Changes) -> Callable[[RunConfig], Changes]:
    """Changes that give this student instead of the preset's."""

    def derived(config: RunConfig) -> Changes:
        arguments = small if min(sides(config.data.image_size)) <= SMALL_IMAGES else {}
        return {"student.model": model, "student.model_kwargs": dict(arguments), **changes}

    return derived


def resnet10(changes: Changes) -> Callable[[RunConfig], Changes]:
    return student("resnet10_coadvised", SMALL_RESNET10, changes)


def mixer(changes: Changes) -> Callable[[RunConfig], Changes]:
    return student("mixer_tiny_coadvised", SMALL_MIXER, changes)


def rows(name: str, one_output: Any, tokens: Any, top1: tuple[float, ...]) -> list[Row]:
    """A student alone, by either teacher, by both."""
    return [
        Row(
            f"{name}, {teachers}",
            used,
            one_output if teachers == "no teacher" else tokens,
            ALONE if teachers == "no teacher" else ADVISED,
            paper={"top1": figure},
        )
        for (teachers, used), figure in zip(TEACHERS.items(), top1, strict=True)
    ]


TRANSFORMER = rows("Transformer-Ti", {**RANDOM, **ONE_TOKEN}, RANDOM, (81.8, 86.5, 85.0, 88.0))
R, M, T = (
    [f"{name}, {teachers}" for teachers in TEACHERS] for name in ("ResNet-10", "Mixer-Ti", "Transformer-Ti")
)  # alone, by conv, by inv, by both

STUDY = Study(
    "Table 4: students of other inductive bias",
    "ImageNet-100",
    [
        *rows("ResNet-10", resnet10(ONE_TOKEN), resnet10({}), (81.5, 83.0, 82.6, 83.4)),
        *rows("Mixer-Ti", mixer(ONE_TOKEN), mixer({}), (80.5, 81.6, 80.9, 82.3)),
        *TRANSFORMER,
        Row("ResNet-10, both on one output", changes=resnet10(ONE_TOKEN), beyond=True),
        Row("Mixer-Ti, both on one output", changes=mixer(ONE_TOKEN), beyond=True),
        Row("Transformer-Ti, both on one output", changes={**RANDOM, **ONE_TOKEN}, beyond=True),
    ],
    [
        Claim(
            "ResNet-10 is similar by both teachers and by ResNet-18 alone", "4.3.2", over(R[3], R[1]), kind="similar"
        ),
        Claim("Transformer-Ti is better by both teachers than by ResNet-18 alone", "4.3.2", over(T[3], T[1])),
        Claim("Transformer-Ti is better by both teachers than by RedNet-26 alone", "4.3.2", over(T[3], T[2])),
        Claim("without teachers, Mixer-Ti and Transformer-Ti are similar", "4.3.2", over(T[0], M[0]), kind="similar"),
        Claim(
            "Transformer-Ti gains more by both teachers than Mixer-Ti", "4.3.2", gains_more((T[3], T[0]), (M[3], M[0]))
        ),
        Claim("Transformer-Ti gains more by both teachers than ResNet-10", "1", gains_more((T[3], T[0]), (R[3], R[0]))),
    ],
)
