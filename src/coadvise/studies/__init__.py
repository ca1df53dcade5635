"""Studies: one file a table or figure of the paper, as configurations. `studies.runner` runs one."""

from coadvise.config.reading import nearest
from coadvise.errors import UserError
from coadvise.studies import (
    attention,
    figure4,
    gain,
    knowledge,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    table7,
    table8,
    table9,
)
from coadvise.studies.question import Claim, Figure, Row, Study

STUDIES: dict[str, Study] = {
    "table1": table1.STUDY,
    "table2": table2.STUDY,
    "table3": table3.STUDY,
    "table4": table4.STUDY,
    "table5": table5.STUDY,
    "table6": table6.STUDY,
    "table7": table7.STUDY,
    "table8": table8.STUDY,
    "table9": table9.STUDY,
    "figure4": figure4.STUDY,
    "knowledge": knowledge.STUDY,
    "attention": attention.STUDY,
    "gain": gain.STUDY,
}


def study_named(name: str) -> Study:
    """Raises UserError for an unknown name, with the nearest known one."""
    if name not in STUDIES:
        raise UserError(f"unknown study '{name}'{nearest(name, list(STUDIES))}; there are {', '.join(STUDIES)}")
    return STUDIES[name]


__all__ = ["STUDIES", "Claim", "Figure", "Row", "Study", "study_named"]
