"""A scatter plot as a stand-alone SVG file, for a document that shows it as an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coadvise.report.charts import Scale, fit_scale
from coadvise.report.markup import Markup, tag

WIDTH, HEIGHT = 720, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 60, 54  # margins
LABEL = 150  # pixels that a point's label may need to its right
# A colour and a shape each, so that a series is recognisable by either. More series reuse them in turn.
LOOKS = (("#0067a8", "circle"), ("#c4500a", "square"), ("#00795a", "diamond"), ("#99478a", "circle"))
INK, SOFT, GRID = "#1c1f24", "#5a616b", "#e9e7e1"


@dataclass(frozen=True)
class Point:
    """A mark at (x, y), its label, and how far its bar reaches up and down, None for no bar."""

    x: float
    y: float
    label: str
    spread: float | None = None


def scatter(
    series: Mapping[str, Sequence[Point]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    joined: bool = True,
    least: float = 0.0,
) -> str:
    """The text of an SVG file. Each mark has the class "mark".

    Args:
        series: points by name.
        joined: whether a line joins the points of a series in their order.
        least: how far the vertical scale goes beyond the lowest and the highest point, so that small differences look
            small.
    """
    points = [point for group in series.values() for point in group]
    x = fit_scale(point.x for point in points)
    y = fit_scale(point.y + sign * max(point.spread or 0, least) for point in points for sign in (-1, 1))
    parts = [tag("rect", width=WIDTH, height=HEIGHT, fill="#ffffff"), *_axes(x, y, x_label, y_label)]
    parts.append(tag("text", title, x=20, y=22, font_size=13, font_weight="600"))
    for number, (name, group) in enumerate(series.items()):
        colour, shape = LOOKS[number % len(LOOKS)]
        at = LEFT + 150 * number
        parts += [_mark(shape, at + 6, 42, colour, ""), tag("text", name, x=at + 18, y=46)]
        places = [(_across(x, point.x), _down(y, point.y)) for point in group]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        if joined:
            parts.append(tag("polyline", points=line, fill="none", stroke=colour, stroke_opacity="0.3"))
        for turn, (point, (px, py)) in enumerate(zip(group, places, strict=True)):
            down = 16 if turn % 2 else -6  # below and above in turn, since neighbours are often close
            parts += _labelled(point, px, py, down, y, colour, _mark(shape, px, py, colour, "mark"))
    return tag(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", width=WIDTH, height=HEIGHT,
        font_family="Liberation Sans, Arial, sans-serif", font_size=12, fill=INK, role="img", aria_label=title,
    ) + "\n"  # fmt: skip


def _across(x: Scale, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * x(value)


def _down(y: Scale, value: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - y(value))


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> list[Markup]:
    right, bottom, middle = WIDTH - RIGHT, HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = []
    for value in x.ticks:
        at = _across(x, value)
        parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=bottom, stroke=GRID))
        parts.append(tag("text", f"{value:g}", x=at, y=bottom + 18, text_anchor="middle", fill=SOFT))
    for value in y.ticks:
        at = _down(y, value)
        parts.append(tag("line", x1=LEFT, x2=right, y1=at, y2=at, stroke=GRID))
        parts.append(tag("text", f"{value:g}", x=LEFT - 8, y=at + 4, text_anchor="end", fill=SOFT))
    parts.append(tag("text", x_label, x=(LEFT + right) / 2, y=HEIGHT - 14, text_anchor="middle"))
    turned = f"translate(20 {middle:g}) rotate(-90)"
    return [*parts, tag("text", y_label, text_anchor="middle", transform=turned)]


def _labelled(point: Point, px: float, py: float, down: int, y: Scale, colour: str, mark: Markup) -> list[Markup]:
    parts = []
    if point.spread is not None:
        low, high = _down(y, point.y - point.spread), _down(y, point.y + point.spread)
        parts.append(tag("line", x1=px, x2=px, y1=low, y2=high, stroke=colour))
    left = px > WIDTH - RIGHT - LABEL
    label = tag("text", point.label, x=px + (-9 if left else 9), y=py + down, text_anchor="end" if left else "start")
    return [*parts, mark, label]


def _mark(shape: str, x: float, y: float, colour: str, name: str) -> Markup:
    class_ = name or None
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=5, fill=colour, class_=class_)
    turn = f"rotate(45 {x:.1f} {y:.1f})" if shape == "diamond" else None
    return tag("rect", x=x - 4.5, y=y - 4.5, width=9, height=9, fill=colour, transform=turn, class_=class_)
