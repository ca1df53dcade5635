"""A scatter plot is an SVG file with every point at its value."""

from xml.etree import ElementTree

import pytest

from coadvise.report.scatter import GRID, HEIGHT, WIDTH, Point, scatter


def test_points_lie_where_their_values_are_and_inside() -> None:
    groups = {f"series {n}": [Point(60 + n, 70 - n, "a <b> & c", 0.5), Point(65, 71 + n, "d")] for n in range(5)}
    root = ElementTree.fromstring(scatter(groups, "a 'title' & more", "x, %", "y, %"))
    marks = [element for element in root.iter() if element.get("class") == "mark"]
    assert len(marks) == 10
    assert len({(m.tag, m.get("fill"), m.get("transform") is None) for m in marks[:6]}) == 3
    places = [(float(m.get("cx") or m.get("x")), float(m.get("cy") or m.get("y"))) for m in marks]  # type: ignore[arg-type]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in places)
    first = places[0::2]
    assert [x for x, _ in first] == sorted(x for x, _ in first)
    assert [y for _, y in first] == sorted(y for _, y in first)  # lower values are lower on the page
    assert len([e for e in root.iter() if e.tag.endswith("text") and e.text == "a <b> & c"]) == 5
    one = ElementTree.fromstring(scatter({"s": [Point(50, 50, "only")]}, "t", "x", "y"))
    assert sum(element.get("class") == "mark" for element in one.iter()) == 1


def test_a_spread_is_drawn_to_both_sides_of_its_mark_and_ticks_are_at_their_values() -> None:
    points = [Point(60, 70, "low", 1.5), Point(64, 74, "high", 3.0)]
    root = ElementTree.fromstring(scatter({"s": points}, "t", "x", "y"))
    lines = [e for e in root.iter() if e.tag.endswith("line") and not e.tag.endswith("polyline")]
    bars = [e for e in lines if e.get("stroke") != GRID]
    marks = [e for e in root.iter() if e.get("class") == "mark"]
    unit = (float(marks[0].get("cy")) - float(marks[1].get("cy"))) / 4  # type: ignore[arg-type]
    for point, bar, mark in zip(points, bars, marks, strict=True):
        ends = [float(bar.get(key)) - float(mark.get("cy")) for key in ("y1", "y2")]  # type: ignore[arg-type]
        assert ends == [pytest.approx(sign * (point.spread or 0) * unit, abs=0.02) for sign in (1, -1)]
        assert all(0 < float(bar.get(key)) < HEIGHT for key in ("y1", "y2"))  # type: ignore[arg-type]
    ticks = {e.text: e for e in root.iter() if e.tag.endswith("text")}
    assert ticks["60"].get("x") == marks[0].get("cx")
    assert ticks["64"].get("x") == marks[1].get("cx")
