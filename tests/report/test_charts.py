"""Scales, ticks, paths and numbers: the arithmetic of every chart."""

import math
import re

import pytest

from coadvise.report.charts import Bar, Dot, Level, Scale, Series, fit_scale, line_chart, path, step_for, thin, track
from coadvise.report.markup import Markup, compact, count, join, percent, points, short, tag


@pytest.mark.parametrize("span", [1e-6, 0.0123, 0.5, 1, 3.3, 17, 99, 1234.5, 8e9])
@pytest.mark.parametrize("most", [2, 4, 5])
def test_steps_are_round_and_fill_the_span_with_at_most_so_many(span, most):
    step = step_for(span, most)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(mantissa == pytest.approx(round_one) for round_one in (1, 2, 5, 10))
    assert span / step <= most + 1e-9
    assert span / step > most / 2.5 - 1e-9


def test_a_fitted_scale_ends_on_its_ticks_and_contains_everything():
    scale = fit_scale([0.561, 0.72, math.nan, math.inf], include=(0.7,))
    assert (scale.low, scale.high) == (0.55, 0.75)
    assert scale.ticks == pytest.approx([0.55, 0.6, 0.65, 0.7, 0.75])
    assert fit_scale([-0.02, 0.03]).ticks == pytest.approx([-0.02, -0.01, 0.0, 0.01, 0.02, 0.03])
    for values in ([], [0.0], [0.7, 0.7], [math.nan], [1e12]):
        scale = fit_scale(values)
        assert scale.high > scale.low
        assert all(math.isfinite(scale(value)) for value in scale.ticks)


def test_a_path_maps_epochs_right_and_values_up_and_breaks_at_non_finite_values():
    x, y = Scale(0.0, 4.0, 1.0), Scale(0.0, 1.0, 0.2)
    assert path([(0, 0.0), (2, 0.5), (4, 1.0)], x, y, 100) == "M0 100L500 50L1000 0"
    broken = [(0, 0.0), (1, math.nan), (2, 0.5), (3, math.inf), (3.5, math.nan), (4, 1.0), (4, 0.5)]
    assert path(broken, x, y, 100) == "M0 100h0M500 50h0M1000 0L1000 50"
    assert path([], x, y, 100) == ""


def test_thinning_keeps_the_ends():
    line = [(float(n), 0.0) for n in range(1000)]
    few = thin(line, 50)
    assert len(few) == 50
    assert (few[0], few[-1]) == (line[0], line[-1])
    assert few == sorted(few)
    assert thin(line[:50], 50) == line[:50]


def chart(*series, **options):
    return line_chart(series, title="Loss", read="{:.2f}".format, mark="{:g}".format, **options)


def test_levels_and_ticks_are_at_the_height_of_the_line_s_values():
    page = chart(Series("class", "tone-student", [(0, 0.0), (1, 0.5)]), levels=[Level("goal", "tone-0", 1.0)])
    line, scale = re.search(r' d="M(.*?)"', page).group(1), {}
    for y, value in re.findall(r'<text x="0" y="([^"]*)"[^>]*>([^<]*)</text>', page):
        scale[float(value)] = y
    assert [place.split()[1] for place in line.split("L")] == [scale[0.0], scale[0.5]]
    assert re.search(r'x2="100%" y1="([^"]*)"[^>]*class="level tone-0"', page).group(1) == scale[1.0] == "0"
    assert "<b>0.50</b>" in page  # the last value, in the legend
    assert "<b>1.00</b>" in page


def test_tooltips_are_columns_around_their_epochs():
    page = chart(Series("class", "tone-student", [(epoch, 1.0 + epoch) for epoch in (0, 1, 4)]))
    strips = re.findall(r"<title>epoch (\S+)\nclass: (.*?)</title></rect>", page)
    places = re.findall(r'<rect x="([\d.]+)%" y="0" width="([\d.]+)%"', page)
    assert strips == [("0", "1.00"), ("1", "2.00"), ("4", "5.00")]
    assert [(float(x), float(width)) for x, width in places] == [(0, 12.5), (12.5, 50), (62.5, 37.5)]


def test_charts_of_nothing_and_of_one_epoch():
    for series in ((), (Series("class", "tone-student", []),), (Series("class", "tone-student", [(1, math.nan)]),)):
        assert "Nothing recorded yet." in chart(*series)
    assert "h0" in chart(Series("class", "tone-student", [(0.0, 2.0)]))
    assert "h0" in chart(Series("class", "tone-student", [(3.0, 0.0)]))


def test_the_marks_of_a_track_are_at_their_values():
    dots = [Dot(0.25, "ring", "a", "one"), Dot(0.75, "dot", "b", "two"), Dot(0.5, "square", "c", "three")]
    page = track(Scale(0.0, 1.0, 1.0), dots, [Bar(0.25, 0.75, "change", "tone-gain")])
    assert re.findall(r'<(?:circle|rect) c?x="(.*?)"', page) == ["25%", "75%", "50%"]
    assert re.search(r'x1="([^"]*)" x2="([^"]*)"[^>]*class="change tone-gain"', page).groups() == ("25%", "75%")


def test_every_string_is_escaped_once():
    element = tag("td", "<b>&", Markup("<i>x</i>"), title='"quoted" <', class_="a", data_x=None)
    assert element == '<td title="&#34;quoted&#34; &lt;" class="a">&lt;b&gt;&amp;<i>x</i></td>'
    assert join(["<", element]) == f"&lt;{element}"
    assert tag("td", title=Markup('"><b>')) == '<td title="&#34;&gt;&lt;b&gt;"></td>'
    assert tag("img", src="x") == '<img src="x">'
    assert tag("line", stroke_width=2.5, x1=1.0) == '<line stroke-width="2.5" x1="1"></line>'


def test_formats_of_numbers():
    assert [short(v) for v in (12.5, 3.0, -0.001, 0.126)] == ["12.5", "3", "0", "0.13"]
    assert (percent(0.8125), percent(None), percent(math.nan)) == ("81.2\u00a0%", "–", "–")
    assert [points(v) for v in (0.071, -0.004, 0.0001, None)] == ["+7.1", "−0.4", "±0.0", "–"]
    assert (count(50000), count(None)) == ("50,000", "–")
    assert [compact(v) for v in (1_234_000, 5400, 12, None)] == ["1.23\u00a0M", "5.4\u00a0k", "12", "–"]
