"""What a study is: rows, columns, and the paper's claims about which row is better."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coadvise.config import RunConfig, TeacherConfig
from coadvise.errors import UserError
from coadvise.runs.plan import ADVISED
from coadvise.studies.columns import TOP1, Column

Changes = Mapping[str, Any]  # to a configuration, by dotted key

# Shared by the rows of several tables.
BOTH = ("conv", "inv")


def aligned(*tokens: str) -> Changes:
    """The configuration in which these tokens, and no others, come from stems of their own kind."""
    return {"student.model_kwargs.aligned": {token: token for token in tokens}}


RANDOM = aligned()
ON_CLASS_TOKEN = {"teachers.conv.token": "class", "teachers.inv.token": "class"}
NAIVE = {**RANDOM, **ON_CLASS_TOKEN}


def must_train(kind: str, config: RunConfig, how: str) -> TeacherConfig:
    """A teacher's configuration. Raises UserError if its weights are given: the study trains it, as `how` says."""
    teacher = config.teachers[kind]
    if not teacher.trained_here:
        raise UserError(
            f"the weights of teacher '{kind}' are given, but this study trains it {how}; leave out "
            f"teachers.{kind}.checkpoint and .pretrained"
        )
    return teacher


@dataclass(frozen=True)
class Row:
    """One network of a study's table.

    Attributes:
        name: as the table shows it; a figure shows what follows the last comma.
        teachers: which of the preset's teachers are used; None: all.
        changes: to the preset's configuration with these teachers, or a function that derives them from it.
        role: what is measured: the student co-advised or alone, or the one teacher in `teachers`.
        answer: the output head, or "average".
        paper: the paper's figures on ImageNet-1k by column, as printed there (percent, millions); empty if not
            available.
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
    """A claim of the paper: the row `higher` has more in a column than the row `lower`."""

    higher: str
    lower: str
    column: str = TOP1.name


@dataclass(frozen=True)
class Figure:
    """Rows as points: one column against another, one series for rows with the same teachers."""

    x: str
    y: str


@dataclass(frozen=True)
class Study:
    """One table or figure of the paper.

    Attributes:
        title: which table or figure, and its question.
        rows: in the table's order; their names differ.
        orders: the paper's claims, each to be judged as held, not held, or within noise.
        columns: what is measured of each row.
        figure: the axes, if the paper shows a figure.
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
