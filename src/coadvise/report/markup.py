"""HTML elements as Python calls. Every string is escaped as it enters an element, unless it is `Markup` already."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup as Markup
from markupsafe import escape

VOID = frozenset({"br", "img", "meta"})  # elements without a closing tag
NO_BREAK_SPACE = "\u00a0"


def join(parts: Iterable[str]) -> Markup:
    """Concatenates pieces, each escaped unless it is markup."""
    return Markup("").join(parts)


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """One element. `class_` becomes class, other underscores become hyphens, None leaves the attribute out."""
    pairs = []
    for key, value in attributes.items():
        if value is not None:
            text = str(value) if isinstance(value, str) else short(value)
            pairs.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    opening = f"<{name}{''.join(pairs)}>"
    return Markup(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def paragraph(kind: str, text: str) -> Markup:
    """A paragraph of class "lead" (main finding), "note" (how to read a figure) or "missing" (nothing to show)."""
    return tag("p", text, class_=kind)


def table(head: Markup, body: Iterable[str], class_: str | None = None) -> Markup:
    """A table that scrolls sideways on a narrow screen. `head` and `body` are rows."""
    cells = tag("table", tag("thead", head), tag("tbody", *body), class_=class_)
    return tag("div", cells, class_="scroll", tabindex="0")


def header_row(names: Iterable[str]) -> Markup:
    """The row of column names of a table."""
    return tag("tr", *(tag("th", name, scope="col") for name in names))


def row(name: str, cells: Iterable[str], class_: str | None = None) -> Markup:
    """A row of a table: its name and its cells, each text or a finished `td`."""
    found = (cell if isinstance(cell, Markup) else tag("td", cell) for cell in cells)
    return tag("tr", tag("th", name, scope="row"), *found, class_=class_)


def short(value: float) -> str:
    """A coordinate with at most two decimals: 12.50 becomes 12.5, 3.00 becomes 3."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent: 0.8125 becomes '81.2 %'. None and non-finite values become a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}{NO_BREAK_SPACE}%"


def points(value: float | None) -> str:
    """A difference of two shares in percentage points, signed: 0.071 becomes '+7.1'."""
    if value is None or not math.isfinite(value):
        return "–"
    rounded = round(100 * value, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else '±'}{abs(rounded):.1f}"


def count(value: float | None) -> str:
    """A whole number with thousands separators: 50000 becomes '50,000'."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def compact(value: float | None) -> str:
    """A large number with three significant figures: 1_234_000 becomes '1.23 M'."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            figures = f"{value / size:.3g}" if abs(value) < 1000 * size else f"{value / size:.0f}"
            return f"{figures}{NO_BREAK_SPACE}{unit}"
    return f"{value:.3g}"
