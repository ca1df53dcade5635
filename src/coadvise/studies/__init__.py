"""Studies: one file a table or figure of the paper, as configurations. `studies.runner` runs one."""

from coadvise.studies import (
    architectures,
    capacity,
    divergence,
    injection,
    knowledge,
    naive,
    shift,
    students,
    teachers,
    tokens,
)
from coadvise.studies.question import Figure, Order, Row, Study

STUDIES: dict[str, Study] = {
    "knowledge": knowledge.STUDY,
    "teachers": teachers.STUDY,
    "architectures": architectures.STUDY,
    "capacity": capacity.STUDY,
    "students": students.STUDY,
    "divergence": divergence.STUDY,
    "naive": naive.STUDY,
    "tokens": tokens.STUDY,
    "injection": injection.STUDY,
    "shift": shift.STUDY,
}

__all__ = ["STUDIES", "Figure", "Order", "Row", "Study"]
