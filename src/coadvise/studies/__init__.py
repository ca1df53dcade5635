"""Studies: one file a question, configurations only. `coadvise study NAME` runs one (`coadvise.study`)."""

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
