"""What a study is: rows to be measured, what is measured of them, and which the paper puts above which."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coadvise.config import RunConfig, TeacherConfig
from coadvise.errors import UserError
from coadvise.runs.plan import ADVISED
from coadvise.studies.columns import TOP1, Column

Changes = Mapping[str, Any]  # to a configuration, by dotted key

# What the rows of several tables have in common.
BOTH = ("conv", "inv")


def aligned(*tokens: str) -> Changes:
    """The configuration in which these tokens, and no others, come from stems of their own kind."""
    return {"student.model_kwargs.aligned": {token: token for token in tokens}}


RANDOM = aligned()
ON_CLASS_TOKEN = {"teachers.conv.token": "class", "teachers.inv.token": "class"}
NAIVE = {**RANDOM, **ON_CLASS_TOKEN}


def must_train(kind: str, config: RunConfig, how: str) -> TeacherConfig:
    """A teacher that a study trains, in this manner. Raises UserError where it is a given one."""
    teacher = config.teachers[kind]
    if not teacher.trained_here:
        raise UserError(
            f"teacher '{kind}' is a given one, and this study trains it {how}; leave out "
            f"teachers.{kind}.checkpoint and .pretrained"
        )
    return teacher


@dataclass(frozen=True)
class Row:
    """One network of a study's table.

    Attributes:
        name: as the table shows it; in a figure what follows its last comma.
        teachers: which of the preset's teachers there are; None is all of them.
        changes: to the preset's configuration with these teachers, or a function that derives them from it.
        role: whose figures they are: the student's co-advised or alone, or those of the one teacher in `teachers`.
        answer: the token that answers, or "average".
        paper: the paper's figures on ImageNet-1k by column, as printed there (percent, millions); none where no public
            one was at hand.
    """

    name: str
    teachers: tuple[str, ...] | None = None
    changes: Changes | Callable[[RunConfig], Changes] = field(default_factory=dict)
    role: str = ADVISED
    answer: str = "class"
    paper: Mapping[str, str] = field(default_factory=dict)

    def changes_of(self, config: RunConfig) -> Changes:
        return self.changes(config) if callable(self.changes) else self.changes


@dataclass(frozen=True)
class Order:
    """A claim: the row `higher` has more in a column than the row `lower`."""

    higher: str
    lower: str
    column: str = TOP1.name


@dataclass(frozen=True)
class Figure:
    """Rows as points: one column against another, a series for rows with the same teachers."""

    x: str
    y: str


@dataclass(frozen=True)
class Study:
    """One question, as a grid of networks.

    Attributes:
        title: the table or figure of the paper, and what it asks.
        rows: in the table's order; their names differ.
        orders: what the paper claims, each to be found held, not held, or within noise.
        columns: what is measured of each row.
        figure: where the paper has one.
    """

    title: str
    rows: Sequence[Row]
    orders: Sequence[Order] = ()
    columns: Sequence[Column] = (TOP1,)
    figure: Figure | None = None

    def __post_init__(self) -> None:
        rows, columns = [row.name for row in self.rows], [column.name for column in self.columns]
        assert len(set(rows)) == len(rows)
        assert {name for order in self.orders for name in (order.higher, order.lower)} <= set(rows)
        assert {order.column for order in self.orders} <= set(columns)
        assert {name for row in self.rows for name in row.paper} <= set(columns)
        assert self.figure is None or {self.figure.x, self.figure.y} <= set(columns)
