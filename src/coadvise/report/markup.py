"""HTML by construction: every string is escaped as it enters a tag, unless it is `Markup` already."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

VOID = frozenset({"br", "img", "meta"})


class Markup(str):
    """Text that is HTML already. Only `tag`, `join` and the page's own style sheet make it."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Text of any origin, safe inside an element and inside a quoted attribute."""
    return text if isinstance(text, Markup) else Markup(html.escape(text, quote=True))


def join(parts: Iterable[str]) -> Markup:
    """Several pieces, each escaped unless it is markup."""
    return Markup("".join(escape(part) for part in parts))


def short(value: float) -> str:
    """A coordinate with at most two decimals: 12.50 becomes 12.5, 3.00 becomes 3."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """One element. `class_` writes class, other underscores become hyphens, None leaves the attribute out."""
    pairs = []
    for key, value in attributes.items():
        if value is not None:
            text = value if isinstance(value, str) else short(value)
            pairs.append(f' {key.rstrip("_").replace("_", "-")}="{html.escape(text, quote=True)}"')
    opening = f"<{name}{''.join(pairs)}>"
    return Markup(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percent: 0.8125 becomes '81.2 %'; what is not a number becomes a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}\u00a0%"


def points(value: float | None) -> str:
    """A difference of two shares in percentage points, signed: 0.071 becomes '+7.1'."""
    if value is None or not math.isfinite(value):
        return "–"
    rounded = round(100 * value, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else '±'}{abs(rounded):.1f}"


def count(value: float | None) -> str:
    """A whole number with thousands marked: 50000 becomes '50,000'."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def compact(value: float | None) -> str:
    """A large number in three figures: 1_234_000 becomes '1.23 M'."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}\u00a0{unit}" if abs(value) < 1000 * size else f"{value / size:.0f}\u00a0{unit}"
    return f"{value:.3g}"
