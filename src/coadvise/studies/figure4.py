"""Figure 4: a teacher's accuracy, varied by its epochs and its size, against that of the student it advises alone.

The paper's points are in a picture, so no figures stand beside the measured ones. Viewed horizontally, teachers of one
kind differ and their students hardly do. A student that gains, but less than its teacher, is judged beside that: it is
weaker than what the paper says. Viewed vertically, teachers of equal accuracy and different kind have different
students: judged on the two kinds' nearest points.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

from coadvise.config.schema import RunConfig
from coadvise.studies.columns import ABOVE_TEACHER, TEACHER_TOP1, TOP1
from coadvise.studies.networks import TEACHERS, must_train
from coadvise.studies.question import RANDOM, Claim, Figure, Row, Study, nearest_pairs, over

KINDS = {"ResNet": ("conv", "conv50"), "RegNet": ("regnet600", "regnet200"), "RedNet": ("inv", "inv50")}
LENGTHS = {"1/4 of its epochs": 1 / 4, "1/2 of its epochs": 1 / 2, "all its epochs": 1.0}


def epochs(teacher: str, share: float) -> Callable[[RunConfig], Mapping[str, Any]]:
    """Changes that give the teacher a share of its epochs, of the warm-up too."""

    def changes(config: RunConfig) -> Mapping[str, Any]:
        recipe, where = must_train(teacher, config, "with fewer epochs").recipe, f"teachers.{teacher}.recipe"
        return {
            **RANDOM,
            f"{where}.epochs": max(1, round(share * recipe.epochs)),
            f"{where}.warmup_epochs": share * recipe.warmup_epochs,
        }

    return changes


def name(teacher: str, length: str) -> str:
    return f"{TEACHERS[teacher].paper}, {length}"


def point(row: str) -> tuple[str, str]:
    """The series of a row in the figure, its kind of teacher, and its label: size and share of the epochs."""
    network, _, how = row.partition(", ")
    kind, _, size = network.partition("-")
    return kind, f"{size}, {how.split()[0]}"


def of_kind(kind: str) -> list[str]:
    teacher, other = KINDS[kind]
    return [*(name(teacher, length) for length in LENGTHS), name(other, "all its epochs")]


def horizontal(kind: str) -> list[Claim]:
    quarter, _, whole, size = of_kind(kind)
    small, large = (size, whole) if kind == "RegNet" else (whole, size)
    same, less = "a student is as accurate by a", "a student gains less than its"
    return [
        Claim(f"(a) {same} {kind} teacher trained for longer", "4.3.1", over(whole, quarter), TOP1.name, "similar"),
        Claim(f"(b) {same} larger {kind} teacher", "4.3.1", over(large, small), TOP1.name, "similar"),
        Claim(f"(a) {less} {kind} teacher by longer training", "", over(quarter, whole), ABOVE_TEACHER.name),
        Claim(f"(b) {less} {kind} teacher by its larger size", "", over(small, large), ABOVE_TEACHER.name),
    ]


STUDY = Study(
    "Figure 4: a teacher's accuracy against its student's",
    "ImageNet-100",
    [
        *(
            Row(name(teacher, length), (teacher,), epochs(teacher, share) if share < 1 else RANDOM)
            for teacher, _ in KINDS.values()
            for length, share in LENGTHS.items()
        ),
        *(Row(name(other, "all its epochs"), (other,), RANDOM) for _, other in KINDS.values()),
    ],
    [
        *(claim for kind in KINDS for claim in horizontal(kind)),
        *(
            Claim(
                f"a {one} and a {other} teacher of nearly equal accuracy have different students",
                "4.3.1",
                nearest_pairs(of_kind(one), of_kind(other), TEACHER_TOP1.name, most=1),
                TOP1.name,
                "differ",
            )
            for one, other in combinations(KINDS, 2)
        ),
    ],
    [TEACHER_TOP1, TOP1, ABOVE_TEACHER],
    Figure(TEACHER_TOP1.name, TOP1.name, point),
)
