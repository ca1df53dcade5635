"""What a study is: rows to be measured, and which of them the paper puts above which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coadvise.run import ADVISED


@dataclass(frozen=True)
class Row:
    """One network of a study's table.

    Attributes:
        name: as the table shows it.
        teachers: which of the preset's teachers there are; None is all of them.
        changes: to the preset's configuration, by dotted key.
        role: whose figure it is: the student co-advised, the student alone, or the teacher named by `teachers`.
        answer: the token that answers, or "average".
        paper: the paper's top-1 on ImageNet-1k in percent; None where no public figure was at hand.
    """

    name: str
    teachers: tuple[str, ...] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    role: str = ADVISED
    answer: str = "class"
    paper: float | None = None


@dataclass(frozen=True)
class Order:
    """A claim: the row `higher` is more accurate than the row `lower`."""

    higher: str
    lower: str


@dataclass(frozen=True)
class Study:
    """One question, as a grid of networks.

    Attributes:
        title: the table or figure of the paper, and what it asks.
        rows: in the table's order; their names differ.
        orders: what the paper claims, each to be found held, not held, or within noise.
    """

    title: str
    rows: Sequence[Row]
    orders: Sequence[Order] = ()

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        assert len(set(names)) == len(names)
        assert {name for order in self.orders for name in (order.higher, order.lower)} <= set(names)
