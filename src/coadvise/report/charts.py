"""Charts as inline SVG. Horizontal positions are percentages, so text has the same size at any page width.

A tone is a style class that sets colour and dash. The whole page uses the same tones: `tone-student`, `tone-alone`,
`tone-average`, `tone-total`, and `tone-0`, `tone-1`, ... for the teachers and the tokens they advise. See style.css.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from coadvise.report.markup import Markup, join, paragraph, short, tag

WIDTH = 1000  # of a line chart's own coordinates, which stretch to the width available
MOST_POINTS = 240  # of a drawn line
MOST_STRIPS = 60  # tooltips of a chart

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """A linear scale from [low, high] to [0, 1], without clipping. Its ticks are multiples of `step`."""

    low: float
    high: float
    step: float

    def __call__(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def percent(self, value: float) -> str:
        """The value's position as a horizontal SVG coordinate."""
        return f"{short(100 * self(value))}%"

    @property
    def ticks(self) -> list[float]:
        """The round numbers between low and high."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [round(place * self.step, 12) for place in range(first, last + 1)]


def step_for(span: float, most: int = 5) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that divides the span into at most `most` steps."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor * most >= span * (1 - 1e-9))


def fit_scale(values: Iterable[float], *, include: Sequence[float] = (), most: int = 5) -> Scale:
    """A scale with round ends that contains all finite values and everything in `include`."""
    finite = [value for value in (*values, *include) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.01 * max(1.0, abs(low)), high + 0.01 * max(1.0, abs(high))
    step = step_for(high - low, most)
    return Scale(round(math.floor(low / step + 1e-9) * step, 12), round(math.ceil(high / step - 1e-9) * step, 12), step)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(place * (len(points) - 1) / (most - 1))] for place in range(most)]


def path(points: Sequence[Point], x: Scale, y: Scale, height: float) -> str:
    """The `d` of a line through (epoch, value) points. A non-finite value breaks the line; a single point is a dot."""
    pieces: list[list[str]] = [[]]
    for px, py in points:
        if math.isfinite(px) and math.isfinite(py):
            pieces[-1].append(f"{short(WIDTH * x(px))} {short(height * (1 - y(py)))}")
        elif pieces[-1]:
            pieces.append([])
    return "".join(f"M{'L'.join(piece)}{'h0' if len(piece) == 1 else ''}" for piece in pieces if piece)


@dataclass(frozen=True)
class Series:
    """A line of a chart. A `faint` line is one seed behind the mean: thin and not in the legend."""

    label: str
    tone: str
    points: Sequence[Point]
    faint: bool = False

    @property
    def finite(self) -> list[Point]:
        """The points with finite coordinates."""
        return [point for point in self.points if math.isfinite(point[0]) and math.isfinite(point[1])]


@dataclass(frozen=True)
class Level:
    """A horizontal reference line, for instance a teacher's final accuracy."""

    label: str
    tone: str
    value: float


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    read: Callable[[float], str],
    mark: Callable[[float], str],
    height: int = 150,
    levels: Sequence[Level] = (),
    include: Sequence[float] = (),
) -> Markup:
    """Lines against epochs, with last values in the legend. `read` formats a value, `mark` a tick of the value axis."""
    points = [point for line in series for point in line.finite]
    if not points:
        nothing = paragraph("missing", "Nothing recorded yet.")
        return tag("figure", tag("figcaption", title), nothing, class_="chart")
    last = max(px for px, _ in points) or 1.0
    x = Scale(0.0, last, max(1.0, step_for(last, 4)))
    values = [*(py for _, py in points), *(level.value for level in levels)]
    y = fit_scale(values, include=include, most=5 if height > 180 else 4)
    lines = [
        tag("path", d=path(thin(line.points), x, y, height), class_=f"line {line.tone}{' faint' if line.faint else ''}")
        for line in sorted(series, key=lambda line: not line.faint)
    ]
    drawing = tag(
        "svg",
        _grid(x, y, height, mark),
        *(_across(y, level.value, height, f"level {level.tone}") for level in levels),
        tag("svg", *lines, viewBox=f"0 0 {WIDTH} {height}", preserveAspectRatio="none", width="100%", height=height),
        *_tooltips([line for line in series if not line.faint], x, height, read),
        class_="plot", height=height + 22, role="img", aria_label=f"{title}, against epochs",
    )  # fmt: skip
    return tag("figure", tag("figcaption", title), _legend(series, levels, read), drawing, class_="chart")


def _across(y: Scale, value: float, height: float, class_: str) -> Markup:
    """A horizontal line through the whole plot."""
    at = height * (1 - y(value))
    return tag("line", x1="0%", x2="100%", y1=at, y2=at, class_=class_)


def _grid(x: Scale, y: Scale, height: int, mark: Callable[[float], str]) -> Markup:
    parts = []
    for value in y.ticks:
        at = height * (1 - y(value))
        parts.append(_across(y, value, height, "grid"))
        parts.append(tag("text", mark(value), x="0", y=at, dx="-8", dy="0.35em", text_anchor="end"))
    for value in x.ticks:
        name = f"{value:g}" if value else "epoch 0"
        anchor = "middle" if value else "start"
        parts.append(tag("line", x1=x.percent(value), x2=x.percent(value), y1=height, y2=height + 4, class_="tick"))
        parts.append(tag("text", name, x=x.percent(value), y=height + 18, text_anchor=anchor))
    return join(parts)


def _tooltips(series: Sequence[Series], x: Scale, height: int, read: Callable[[float], str]) -> list[Markup]:
    """Invisible columns with a title, which the browser shows on hover: the values at that epoch. No script needed."""
    table: dict[float, list[str]] = {}
    for line in series:
        for px, py in line.finite:
            table.setdefault(px, []).append(f"{line.label}: {read(py)}")
    places = [px for px, _ in thin([(px, 0.0) for px in sorted(table)], MOST_STRIPS)]
    edges = [places[0], *((a + b) / 2 for a, b in pairwise(places)), places[-1]]
    return [
        tag(
            "rect", tag("title", f"epoch {px:.4g}\n" + "\n".join(table[px])),
            x=x.percent(left), y="0", width=f"{short(100 * (x(right) - x(left)))}%", height=height, class_="strip",
        )
        for px, left, right in zip(places, edges, edges[1:], strict=False)
    ]  # fmt: skip


def swatch(tone: str, *, level: bool = False) -> Markup:
    """A short piece of a line, for a legend."""
    line = tag("line", x1="1", x2="25", y1="6", y2="6", class_=f"{'level' if level else 'line'} {tone}")
    return tag("svg", line, class_="swatch", width="26", height="12", aria_hidden="true")


def _legend(series: Sequence[Series], levels: Sequence[Level], read: Callable[[float], str]) -> Markup:
    rows = [(swatch(s.tone), s.label, s.finite[-1][1]) for s in series if not s.faint and s.finite]
    rows += [(swatch(level.tone, level=True), level.label, level.value) for level in levels]
    entries = (tag("li", key, f" {label} ", tag("b", read(value))) for key, label, value in rows)
    return tag("ul", *entries, class_="legend")


@dataclass(frozen=True)
class Dot:
    """A value on a track. Shapes: 'square' a teacher, 'ring' a student alone, 'dot' a co-advised student."""

    value: float
    shape: str
    tone: str
    title: str


@dataclass(frozen=True)
class Bar:
    """A range on a track: 'whisker' (thin), 'band' (thick and pale) or 'change' (between two dots)."""

    low: float
    high: float
    kind: str
    tone: str


def marker(dot: Dot, x: str, y: float) -> Markup:
    """The marker of a dot at a horizontal percentage and a height in pixels."""
    name = f"{dot.shape} {dot.tone}"
    if dot.shape == "square":
        centred = "translate(-4.5 -4.5)"
        return tag("rect", tag("title", dot.title), x=x, y=y, width="9", height="9", transform=centred, class_=name)
    return tag("circle", tag("title", dot.title), cx=x, cy=y, r=4.5 if dot.shape == "ring" else 5.5, class_=name)


def key(shape: str, tone: str, label: str) -> Markup:
    """A legend entry for a marker."""
    mark = marker(Dot(0, shape, tone, label), "7", 7)
    return tag("li", tag("svg", mark, width="14", height="14", class_="swatch", aria_hidden="true"), f" {label}")


def track(x: Scale, dots: Sequence[Dot], bars: Sequence[Bar] = (), *, height: int = 30, zero: bool = False) -> Markup:
    """The drawing of a row of a dot plot: grid lines (which join those of the next row), bars, then markers."""
    middle = height / 2
    lines = []
    for value in x.ticks:
        at, look = x.percent(value), "zero" if zero and value == 0 else "grid"
        lines.append(tag("line", x1=at, x2=at, y1="0", y2=height, class_=look))
    for bar in bars:
        low, high = x.percent(bar.low), x.percent(bar.high)
        lines.append(tag("line", x1=low, x2=high, y1=middle, y2=middle, class_=f"{bar.kind} {bar.tone}"))
    marks = [marker(dot, x.percent(dot.value), middle) for dot in dots]
    label = "; ".join(dot.title for dot in dots)
    return tag("svg", *lines, *marks, class_="track", height=height, role="img", aria_label=label)


def axis_row(x: Scale, mark: Callable[[float], str]) -> Markup:
    """The last row of a dot plot: the numbers of its scale."""
    numbers = [tag("text", mark(v), x=x.percent(v), y="14", text_anchor="middle") for v in x.ticks]
    return _row("", tag("svg", *numbers, class_="track", height="20", aria_hidden="true"), "", "row axis")


def dot_row(name: str, drawing: Markup, value: str) -> Markup:
    """A row of a dot plot: a name, a track, a value."""
    return _row(name, drawing, value, "row")


def _row(name: str, drawing: Markup, value: str, class_: str) -> Markup:
    label = tag("span", name, class_="name", title=name or None)
    return tag("div", label, drawing, tag("span", value, class_="value"), class_=class_)
