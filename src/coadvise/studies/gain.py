"""When does advice help? The gain over the number of pictures, the student's epochs, and its teachers' lead.

The paper has no such figure; it distils on 100 and on 1,000 classes of ImageNet, with all pictures. Students and
tokens are the preset's, each teacher advises the class token besides its own, and students of all lengths have the
same teachers. A preset that lets every network see each picture for a number of epochs trains for fewer steps where
there are fewer pictures, so the gain by more epochs shows how far that matters.
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from coadvise.config.schema import RunConfig
from coadvise.runs.plan import ADVISED, ALONE
from coadvise.studies.columns import GAIN, LEAD, TOP1
from coadvise.studies.question import BOTH, Claim, Figure, Row, Study, over

PICTURES = {"20 a class": 20, "50 a class": 50, "100 a class": 100, "all": None}
LENGTHS = {"the preset's epochs": 1, "4 times as many": 4}


def changes(pictures: int | None, factor: int) -> Callable[[RunConfig], Mapping[str, Any]]:
    """A number of pictures a class, and a factor on the student's epochs."""

    def of(config: RunConfig) -> Mapping[str, Any]:
        return {
            **{f"teachers.{name}.token": [name, "class"] for name in config.teachers},
            "data.per_class": pictures,
            "student.recipe.epochs": factor * config.student.recipe.epochs,
        }

    return of


def name(pictures: str, length: str, role: str) -> str:
    return f"{pictures}, {length}, {'co-advised' if role == ADVISED else role}"


def point(row: str) -> tuple[str, str]:
    """The series of a row in the figure, and its label there."""
    pictures, length, _ = row.split(", ")
    return length, pictures


CASES = list(product(PICTURES, LENGTHS))

STUDY = Study(
    "Beyond the paper: when does advice help, over pictures, epochs and the teachers' lead",
    "",
    [
        Row(name(pictures, length, role), BOTH, changes(PICTURES[pictures], LENGTHS[length]), role)
        for pictures, length in CASES
        for role in (ALONE, ADVISED)
    ],
    [
        Claim(
            f"advice helps with {pictures}, {length}",
            "",
            over(name(pictures, length, ADVISED), name(pictures, length, ALONE)),
        )
        for pictures, length in CASES
    ],
    [TOP1, GAIN, LEAD],
    Figure(LEAD.name, GAIN.name, point),
)
