"""Studies: one file a question, configurations only. `coadvise study NAME` runs one (`coadvise.study`)."""

from coadvise.studies import injection, naive, tokens
from coadvise.studies.question import Order, Row, Study

STUDIES: dict[str, Study] = {"naive": naive.STUDY, "tokens": tokens.STUDY, "injection": injection.STUDY}

__all__ = ["STUDIES", "Order", "Row", "Study"]
