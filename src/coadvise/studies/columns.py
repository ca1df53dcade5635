"""The columns of a study's table, declared. `studies.measures` measures them."""

from dataclasses import dataclass

# Corruptions are made and scored 45 times: this much of them is enough for a table, and takes minutes on a CPU.
SEVERITIES, IMAGES = (1, 3, 5), 1000
SPEED_SIZE, SPEED_BATCH = 224, 64  # pixels and images: the protocol of Table 3


@dataclass(frozen=True)
class Column:
    """One figure of every row.

    Attributes:
        name: its key in the JSON file, in `Row.paper` and in `Claim.column`.
        heading: as the table shows it, with its unit unless that is a percent sign.
        measure, argument: a key of `measures.MEASURES`, and what that function gets.
        scale, digits, unit: how a figure is shown.
        note: a sentence below the table.
        exact: a difference needs no interval.
    """

    name: str
    heading: str
    measure: str
    argument: str = ""
    scale: float = 100.0
    digits: int = 1
    unit: str = " %"
    note: str = ""
    exact: bool = False


def kl_to(teacher: str, name: str) -> Column:
    """KL(teacher ‖ head) on the validation images, as `coadvise evaluate` gives it. `name` is the paper's network."""
    return Column(f"kl_{teacher}", f"KL from {name}, nats", "kl", teacher, 1, 3, "")


def same_answer(teacher: str, name: str) -> Column:
    """Share of the validation images on which a row predicts the class that this teacher, itself a row, predicts."""
    return Column(f"same_as_{teacher}", f"same answer as {name}", "same_answer", teacher)


def overlap_of_tokens(rule: str, heading: str, note: str = "") -> Column:
    """How much of the maps of a student's two advised tokens is the same; `rule` is a field of `AttentionMaps`."""
    return Column(f"overlap_{rule}", heading, "overlap", rule, note=note)


def given_by_shift(layout: str, heading: str) -> Column:
    """Top-1 on a shifted test set; not measured unless --shift gives its folder, see `measures.with_shifts`."""
    return Column(layout.replace("-", "_"), heading, "not_measured", layout)


TOP1 = Column("top1", "top-1", "top1")
TEACHER_TOP1 = Column("teacher_top1", "the teacher's top-1", "teacher_top1")
ABOVE_TEACHER = Column(
    "above_teacher",
    "top-1 above the teacher's",
    "above_teacher",
    note="Top-1 above the teacher's: if it falls as teachers get better, students gain less than they do.",
)
GAIN = Column("gain", "gain by advice", "gain", unit="", note="Gain: points above the student alone, the row before.")
LEAD = Column("lead", "the better teacher's lead", "lead", unit="", note="Lead: its points above that student alone.")
PARAMETERS = Column(
    "parameters",
    "parameters, M",
    "parameters",
    scale=1e-6,
    digits=1,
    unit="",
    note="Parameters: of the paper's network, with 1000 classes.",
    exact=True,
)
SPEED = Column(
    "images_per_second",
    "images/s",
    "images_per_second",
    scale=1,
    digits=0,
    unit="",
    note=f"Images/s: the paper's network, {SPEED_BATCH} images of {SPEED_SIZE} pixels at a time, all networks in turn "
    "on this machine.",
    exact=True,
)
CORRUPTION_ERROR = Column(
    "corruption_error",
    "C (mean corruption error)",
    "corruption_error",
    note="Mean corruption error: not normalised, the validation images (at most "
    f"{IMAGES}, evenly chosen) under 15 corruptions made here at severities {', '.join(map(str, SEVERITIES))}.",
)
SHIFTED = (TOP1, given_by_shift("imagenet-a", "A"), given_by_shift("imagenet-r", "R"), CORRUPTION_ERROR)
