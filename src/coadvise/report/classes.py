"""Which classes gained, and who answers alike?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coadvise.report.answers import agreement, comparable, group_per_class, per_class, teacher_name, tone, voices
from coadvise.report.charts import Bar, Dot, Scale, axis, dot_row, fit_scale, key, track
from coadvise.report.markup import Markup, count, join, percent, points, tag
from coadvise.report.read import ADVISED, ALONE, Floats, Run, group_of, mapping, number, sequence
from coadvise.report.verdict import table

MOST_CLASSES = 40

Line = tuple[str, str, str, Floats]  # name, marker, tone, accuracy of each class [K]


def lines_of(run: Run) -> list[Line]:
    """The accuracy per class of each teacher, the student alone and the co-advised one (means over seeds)."""
    classes = max([len(run.classes), *(predictions.classes for predictions in run.predictions.values())])
    found: list[Line] = []
    for part in run.parts:
        if part.startswith("teachers/") and part in run.predictions and "class" in run.predictions[part].answers:
            look = tone(run, part.removeprefix("teachers/"))
            found.append((teacher_name(run, part), "square", look, per_class(run.predictions[part], "class", classes)))
    for name, shape, look, group in (
        ("student alone", "ring", "tone-alone", ALONE),
        ("student co-advised", "dot", "tone-student", ADVISED),
    ):
        accuracy = group_per_class(run, group, classes)
        if accuracy is not None:
            found.append((name, shape, look, accuracy))
    return found


def class_gains(run: Run) -> Markup:
    """The dot plot of accuracy per class, by gain where there is a student alone, else by accuracy."""
    lines = lines_of(run)
    if not lines:
        return tag("p", "No predictions have been saved yet, so no accuracy per class is known.", class_="missing")
    by_shape = {shape: accuracy for _, shape, _, accuracy in lines}
    gains = by_shape["dot"] - by_shape["ring"] if {"dot", "ring"} <= set(by_shape) else None
    key_of = gains if gains is not None else lines[-1][3]
    order = [int(k) for k in np.argsort(-np.nan_to_num(key_of, nan=-np.inf), kind="stable") if np.isfinite(key_of[k])]
    half = MOST_CLASSES // 2
    blocks = [order] if len(order) <= MOST_CLASSES else [order[:half], order[-half:]]
    heads = (
        ["The 20 that gained most", "The 20 that gained least"]
        if gains is not None
        else ["The 20 best", "The 20 worst"]
    )
    legend = tag("ul", *(key(shape, look, name) for name, shape, look, _ in lines), class_="legend")
    note = (
        "Accuracy on each class’s validation images, the class token’s answer; the mean where there are several seeds."
    )
    if gains is not None:
        note += " The bar runs from the student alone to the co-advised one: green a gain, red a loss."
    x = fit_scale(float(accuracy[k]) for block in blocks for k in block for *_, accuracy in lines)
    figures = [
        join([tag("h3", heads[place]) if len(blocks) > 1 else "", _block(run, block, lines, gains, x)])
        for place, block in enumerate(blocks)
    ]
    return join([tag("p", _finding(run, order, gains), class_="lead"), legend, *figures, tag("p", note, class_="note")])


def _finding(run: Run, order: Sequence[int], gains: Floats | None) -> str:
    if not order:
        return "No class has validation images."
    if gains is None:
        return "A gain needs both a student alone and a co-advised one; without it, classes are sorted by accuracy."
    gained, lost = sum(gains[k] > 0 for k in order), sum(gains[k] < 0 for k in order)
    first, last = order[0], order[-1]
    return (
        f"{gained} of {len(order)} classes gained from advice and {lost} lost. The most: {run.class_name(first)} "
        f"({points(gains[first])} points); the least: {run.class_name(last)} ({points(gains[last])})."
    )


def _block(run: Run, block: Sequence[int], lines: Sequence[Line], gains: Floats | None, x: Scale) -> Markup:
    rows = []
    for k in block:
        dots = [
            Dot(float(accuracy[k]), shape, look, f"{run.class_name(k)}, {name}: {percent(float(accuracy[k]))}")
            for name, shape, look, accuracy in lines
            if np.isfinite(accuracy[k])
        ]
        ends = {dot.shape: dot.value for dot in dots}
        bars, value = [], percent(float(lines[-1][3][k]))
        if gains is not None:
            look = "tone-gain" if gains[k] >= 0 else "tone-loss"
            bars, value = [Bar(ends["ring"], ends["dot"], "change", look)], points(float(gains[k]))
        rows.append(dot_row(run.class_name(k), track(x, dots, bars, height=24), value))
    titles = dot_row("", axis(x, lambda v: f"{100 * v:.0f}\u00a0%"), "", kind="axis")
    return tag("figure", *rows, titles, class_="dots")


def agreements(run: Run) -> Markup:
    """The share of the same answers of every two voices, as a lower triangle."""
    found = comparable(run, voices(run))
    if len(found) < 2:
        return tag("p", "Agreement needs the predictions of at least two; they are not there yet.", class_="missing")
    shares = agreement(run, found)
    below = [float(shares[i, j]) for i in range(len(found)) for j in range(i)]
    low, high = min(below), max(below)
    body = []
    for i, voice in enumerate(found[1:], start=1):
        cells = []
        for j in range(len(found) - 1):
            strength = (shares[i, j] - low) / (high - low) if high > low else 0.5
            style = f"--a:{0.06 + 0.5 * strength:.2f}"
            title = f"{voice.name} and {found[j].name}"
            cells.append(tag("td", percent(float(shares[i, j]), 0), style=style, title=title) if j < i else tag("td"))
        body.append(tag("tr", tag("th", voice.name, scope="row"), *cells))
    head = tag("tr", tag("td"), *(tag("th", voice.name, scope="col") for voice in found[:-1]))
    images = len(run.predictions[found[0].part].labels)
    note = (
        f"Share of {count(images)} validation images with the same answer, right or wrong. Of several seeds, the first."
    )
    return join(
        [
            tag(
                "div",
                tag("table", tag("thead", head), tag("tbody", *body), class_="matrix"),
                class_="scroll",
                tabindex="0",
            ),
            tag("p", note, class_="note"),
            divergences(run),
        ]
    )


def divergences(run: Run) -> Markup:
    """How far each of the student's answers is from each teacher's (Table 5 of the paper), mean over seeds."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in map(mapping, sequence(run.last("verdict").get("divergences"))):
        kl, (group, _) = number(record.get("kl")), group_of(str(record.get("part")))
        if kl is not None:
            row = found.setdefault((group, str(record.get("answer"))), {})
            row.setdefault(str(record.get("teacher")), []).append(kl)
    if not found:
        return Markup()
    teachers = list(dict.fromkeys(teacher for row in found.values() for teacher in row))
    names = {ADVISED: "co-advised", ALONE: "alone"}
    body = [
        tag(
            "tr",
            tag("th", f"student {names.get(group, group)}, {answer}", scope="row"),
            *(tag("td", f"{np.mean(row[teacher]):.3f}" if teacher in row else "–") for teacher in teachers),
        )
        for (group, answer), row in sorted(found.items(), key=lambda item: item[0][0] != ALONE)
    ]
    note = "KL divergence from the teacher’s probabilities to the answer’s, nats, mean over images and over seeds."
    head = ("", *(teacher_name(run, f"teachers/{teacher}") for teacher in teachers))
    return join([tag("h3", "How far from each teacher?"), table(head, body), tag("p", note, class_="note")])
