"""The columns of a study's table, declared. `studies.measures` measures them."""

from dataclasses import dataclass

# Corruptions are made and scored 45 times: this much of them is enough for a table, and takes minutes on a CPU.
SEVERITIES, IMAGES = (1, 3, 5), 1000


@dataclass(frozen=True)
class Column:
    """One figure of every row.

    Attributes:
        name: its key in the JSON file, in `Row.paper` and in `Order.column`.
        heading: as the table shows it, with its unit unless that is a percent sign.
        measure, argument: a key of `measures.MEASURES`, and what that function gets.
        scale, digits, unit: how a figure is shown.
        note: a sentence below the table.
    """

    name: str
    heading: str
    measure: str
    argument: str = ""
    scale: float = 100.0
    digits: int = 1
    unit: str = " %"
    note: str = ""


def kl_to(teacher: str) -> Column:
    """KL(teacher ‖ head) on the validation images, as `coadvise evaluate` gives it."""
    return Column(f"kl_{teacher}", f"KL from the {teacher} teacher, nats", "kl", teacher, 1, 3, "")


def same_answer(teacher: str) -> Column:
    """Share of the validation images on which a row predicts the class that this teacher, itself a row, predicts."""
    return Column(f"same_as_{teacher}", f"same answer as the {teacher} teacher", "same_answer", teacher)


TOP1 = Column("top1", "top-1", "top1")
TEACHER_TOP1 = Column("teacher_top1", "the teacher's top-1", "teacher_top1")
ABOVE_TEACHER = Column(
    "above_teacher",
    "top-1 above the teacher's",
    "above_teacher",
    note="Top-1 above the teacher's: if it falls as teachers get better, students gain less than they do.",
)
ABOVE_ALONE = Column("above_alone", "top-1 above alone", "above_alone")
PARAMETERS = Column("parameters", "parameters, M", "parameters", scale=1e-6, digits=2, unit="")
SPEED = Column(
    "images_per_second",
    "images/s",
    "images_per_second",
    scale=1,
    digits=0,
    unit="",
    note="Images/s: the class head, batches of 64, all networks in turn on this machine.",
)
CORRUPTION_ERROR = Column(
    "corruption_error",
    "mean corruption error",
    "corruption_error",
    note="Mean corruption error: not normalised, the validation images (at most "
    f"{IMAGES}, evenly chosen) under 15 corruptions made here at severities {', '.join(map(str, SEVERITIES))}.",
)
