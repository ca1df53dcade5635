"""What a study is: rows with the paper's figures, columns, and the paper's claims about them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from coadvise.config.schema import RunConfig
from coadvise.runs.plan import ADVISED
from coadvise.studies.columns import TOP1, Column

Changes = Mapping[str, Any]  # to a configuration, by dotted key
Weights = Mapping[str, float]  # by row; a claim is about the weighted sum of a column
Means = Mapping[str, Mapping[str, float]]  # a column's mean by column and row, in the table's units

# Shared by the rows of several tables.
BOTH = ("conv", "inv")
COUNTED = "counted"  # the role of a network that no study trains


def aligned(*tokens: str) -> Changes:
    """The configuration in which these tokens, and no others, come from stems of their own kind."""
    return {"student.model_kwargs.aligned": {token: token for token in tokens}}


RANDOM = aligned()
ONE_TOKEN = {"teachers.conv.token": "class", "teachers.inv.token": "class"}
LABELS = {"student.label_tokens": ["class", "conv", "inv"]}  # every token learns from the labels


@dataclass(frozen=True)
class Row:
    """One line of a study's table.

    Attributes:
        name: as the paper's table has it.
        teachers: keys of `networks.TEACHERS`.
        changes: to the configuration with these teachers, or a function that derives them from it.
        role: what is scored: the student co-advised or alone, the one teacher in `teachers`, or a network that is only
            counted and timed, unless its weights are given.
        answer: the output head, or "average".
        paper: the paper's figures by column, as printed there (percent, millions).
        beyond: the paper has no such row.
        network: the paper's network that is counted and timed, a key of `networks.PAPER_MODELS`.
        networks: with the paper's own networks: those of this row, where they are not the study's.
        paper_only: trained with the paper's own networks, and counted otherwise.
    """

    name: str
    teachers: tuple[str, ...] = BOTH
    changes: Changes | Callable[[RunConfig], Changes] = field(default_factory=dict)
    role: str = ADVISED
    answer: str = "class"
    paper: Mapping[str, float] = field(default_factory=dict)
    beyond: bool = False
    network: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)
    paper_only: bool = False

    def changes_of(self, config: RunConfig) -> Changes:
        return self.changes(config) if callable(self.changes) else self.changes


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper about a column of its table.

    Attributes:
        text: the sentence, in our words.
        section: where the paper says it; "" if it does not.
        rows: the weights of the rows, or a function that chooses them by the figures found.
        column: a column's name.
        kind: the weighted sum is above zero, near zero (within `SIMILAR`), or not zero.
    """

    text: str
    section: str
    rows: Weights | Callable[[Means], Weights]
    column: str = TOP1.name
    kind: Literal["above", "similar", "differ"] = "above"

    def weights(self, means: Means) -> Weights:
        """Raises KeyError if a column that chooses the rows was not measured."""
        return self.rows(means) if callable(self.rows) else self.rows


SIMILAR = 0.015  # as a share: 1.5 points. The paper calls 80.5 and 81.8 % similar (Table 4).
NEAR = 2 * SIMILAR  # farther apart no rows are called nearly equal


def over(higher: str, lower: str) -> Weights:
    """One row is above another."""
    return {higher: 1, lower: -1}


def gains_more(better: tuple[str, str], worse: tuple[str, str]) -> Weights:
    """From the second row of a pair to its first, the better pair gains more than the worse one."""
    weights: dict[str, float] = {}
    for sign, (end, start) in ((1, better), (-1, worse)):
        weights[end] = weights.get(end, 0) + sign
        weights[start] = weights.get(start, 0) - sign
    return weights


def nearest_pairs(ones: Sequence[str], others: Sequence[str], column: str, most: int) -> Callable[[Means], Weights]:
    """The rows of two kinds that are nearest in a column, each row once: those of `ones` less those of `others`.

    None if one of the `most` pairs is more than `NEAR` apart, so that the claim is not judged.
    """

    def weights(means: Means) -> Weights:
        left, found = {*ones, *others}, dict[str, float]()
        at = means[column]
        pairs = sorted(((a, b) for a in ones for b in others), key=lambda pair: abs(at[pair[0]] - at[pair[1]]))
        for one, other in pairs:
            if {one, other} <= left and len(found) < 2 * most:
                left -= {one, other}
                found |= {one: 1 / most, other: -1 / most}
                if abs(at[one] - at[other]) > NEAR:
                    return {}
        return found

    return weights


def negated(rows: Callable[[Means], Weights]) -> Callable[[Means], Weights]:
    """The same rows with the other sign."""
    return lambda means: {row: -weight for row, weight in rows(means).items()}


@dataclass(frozen=True)
class Figure:
    """Rows as points, one column against another.

    Attributes:
        x, y: names of columns.
        point: from a row's name, its series and its label.
    """

    x: str
    y: str
    point: Callable[[str], tuple[str, str]]


@dataclass(frozen=True)
class Study:
    """One table or figure of the paper.

    Attributes:
        title: which table or figure, and its question.
        paper_data: the data of the paper's figures.
        rows: in the paper's order, then those beyond it; their names differ.
        claims: what the paper says of them.
        columns: what is measured of each row.
        figure: the axes, if the paper shows a figure.
        networks: the paper's networks by teacher or `networks.STUDENT`, where they are not those of its ImageNet-100
            tables.
        notes: sentences below the table.
    """

    title: str
    paper_data: str
    rows: Sequence[Row]
    claims: Sequence[Claim] = ()
    columns: Sequence[Column] = (TOP1,)
    figure: Figure | None = None
    networks: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows, columns = [row.name for row in self.rows], [column.name for column in self.columns]
        assert len(set(rows)) == len(rows)
        assert {row for claim in self.claims if not callable(claim.rows) for row in claim.rows} <= set(rows)
        assert {claim.column for claim in self.claims} <= set(columns)
        assert {name for row in self.rows for name in row.paper} <= set(columns)
        assert self.figure is None or {self.figure.x, self.figure.y} <= set(columns)
        assert [row.beyond for row in self.rows] == sorted(row.beyond for row in self.rows)

    @property
    def of_the_paper(self) -> bool:
        """Whether the paper makes claims about these rows."""
        return any(claim.section for claim in self.claims)

    def of_paper(self) -> "Study":
        """The paper's rows alone."""
        return replace(self, rows=[row for row in self.rows if not row.beyond])

    def as_printed(self, column: str, value: float | None) -> str:
        """A figure of the paper with the digits of its column there; empty if the paper has none."""
        if value is None:
            return ""
        all_digits = [len(str(row.paper[column]).partition(".")[2]) for row in self.rows if column in row.paper]
        mixed = next(found.exact for found in self.columns if found.name == column)  # sizes and speeds, of any digits
        return f"{value:g}" if mixed else f"{value:.{max(all_digits)}f}"

    def lines(self) -> Iterator[str]:
        """What `coadvise studies NAME` prints: the paper's table and claims."""
        told = [column for column in self.columns if any(column.name in row.paper for row in self.rows)]
        width = max(len(row.name) for row in self.rows)
        yield self.title
        if self.of_the_paper:
            yield f"The paper's figures ({self.paper_data}):" if told else "The paper gives no figures as text."
        yield ""
        heads = [f"{column.heading}{column.unit}" for column in told]
        if told:
            yield "  ".join([" " * width, *heads])
        marked = False
        for row in self.rows:
            if row.beyond and not marked:
                marked = True
                yield "-- beyond the paper --"
            cells = [
                self.as_printed(column.name, row.paper.get(column.name)).rjust(len(head))
                for column, head in zip(told, heads, strict=True)
            ]
            yield "  ".join([row.name.ljust(width), *cells]).rstrip()
        yield ""
        yield "The paper's claims, by section:" if self.of_the_paper else "What is judged:"
        for claim in self.claims:
            yield f"  {claim.section:14} {claim.text}"

    def described(self) -> dict[str, Any]:
        """What `coadvise studies NAME --json` prints besides the name."""
        return {
            "title": self.title,
            "paper_data": self.paper_data,
            "rows": [{"name": row.name, "paper": dict(row.paper), "beyond": row.beyond} for row in self.rows],
            "claims": [{"text": claim.text, "section": claim.section} for claim in self.claims],
        }
