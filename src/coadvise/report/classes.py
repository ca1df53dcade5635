"""Which classes gained, and which predictors agree?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coadvise.report.charts import Bar, Dot, Scale, axis_row, dot_row, fit_scale, key, track
from coadvise.report.markup import Markup, count, header_row, join, paragraph, percent, points, row, table, tag
from coadvise.report.predictors import (
    agreement,
    class_accuracy,
    comparable,
    confusion,
    group_parts,
    predictors,
    teacher_name,
)
from coadvise.report.read import ADVISED, ALONE, Floats, Ints, Run, group_of, mapping, number, sequence

MOST_CLASSES = 40
MOST_CONFUSED, MOST_MISTAKES = 20, 15  # up to so many classes have the whole matrix; with more, so many mistakes

Line = tuple[str, str, str, Floats]  # name, marker, tone, accuracy of each class [K]


def lines_of(run: Run) -> list[Line]:
    """The accuracy by class of each teacher, the student alone and the co-advised student (means over seeds)."""
    classes = max([len(run.classes), *(predictions.classes for predictions in run.predictions.values())])
    groups = [(teacher.name, "square", teacher.tone, teacher.part) for teacher in predictors(run) if teacher.is_teacher]
    groups += [("student alone", "ring", "tone-alone", ALONE), ("student co-advised", "dot", "tone-student", ADVISED)]
    found: list[Line] = []
    for name, shape, look, group in groups:
        rows = [class_accuracy(run.predictions[part], classes) for part in group_parts(run, group)]
        found += [(name, shape, look, np.mean(rows, axis=0))] if rows else []
    return found


def class_gains(run: Run) -> Markup:
    """The dot plot of accuracy by class. Sorted by gain if there is a student alone, else by accuracy."""
    lines = lines_of(run)
    if not lines:
        return paragraph("missing", "No predictions have been saved yet, so the accuracy by class is unknown.")
    by_shape = {shape: accuracy for _, shape, _, accuracy in lines}
    gains = by_shape["dot"] - by_shape["ring"] if {"dot", "ring"} <= set(by_shape) else None
    key_of = gains if gains is not None else lines[-1][3]
    order = [int(k) for k in np.argsort(-np.nan_to_num(key_of, nan=-np.inf), kind="stable") if np.isfinite(key_of[k])]
    half = MOST_CLASSES // 2
    blocks = [order] if len(order) <= MOST_CLASSES else [order[:half], order[-half:]]
    ends = ("best", "worst") if gains is None else ("that gained most", "that gained least")
    legend = tag("ul", *(key(shape, look, name) for name, shape, look, _ in lines), class_="legend")
    note = f"Accuracy of the class token on the {run.scored} images of each class, averaged over seeds."
    if gains is not None:
        note += " The bar runs from the student alone to the co-advised one: green is a gain, red a loss."
    x = fit_scale(float(accuracy[k]) for block in blocks for k in block for *_, accuracy in lines)
    figures = []
    for end, block in zip(ends, blocks, strict=False):
        figures += [tag("h3", f"The {half} {end}")] if len(blocks) > 1 else []
        figures.append(_block(run, block, lines, gains, x))
    return join(
        [paragraph("lead", _finding(run, order, gains)), legend, *figures, paragraph("note", note), confusions(run)]
    )


def confusions(run: Run) -> Markup:
    """Recall, precision and F1 a class of the co-advised student, and what it takes for what."""
    parts = group_parts(run, ADVISED)
    if not parts:
        return Markup()
    predictions = run.predictions[parts[0]]
    classes = max(len(run.classes), predictions.classes)
    counts = confusion(predictions, classes)
    heading = tag("h3", "What is taken for what")
    note = "Co-advised student of the first seed, class token."
    if classes > MOST_CONFUSED:
        return join([heading, _worst(run, counts), paragraph("note", f"{note} The most frequent mistakes.")])
    right, images, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    body = []
    for k in range(classes):
        cells = [
            tag("td", count(float(counts[k, other])) if counts[k, other] else "·", style=_heat(counts[k], other))
            for other in range(classes)
        ]
        ratios = [right[k] / images[k] if images[k] else None, right[k] / said[k] if said[k] else None]
        ratios.append(2 * right[k] / (images[k] + said[k]) if images[k] + said[k] else None)
        body.append(row(run.class_name(k), [*(percent(ratio, 0) for ratio in ratios), *cells]))
    head = header_row(("", "recall", "precision", "F1", *(run.class_name(k) for k in range(classes))))
    note += f" Rows are the labels, columns the predictions, of {count(float(counts.sum()))} {run.scored} images."
    return join([heading, table(head, body, "matrix narrow"), paragraph("note", note)])


def _heat(row_counts: Ints, column: int) -> str | None:
    total = row_counts.sum()
    return f"--a:{0.6 * row_counts[column] / total:.2f}" if total and row_counts[column] else None


def _worst(run: Run, counts: Ints) -> Markup:
    """The most frequent mistakes."""
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:MOST_MISTAKES]
    pairs = [divmod(int(place), len(counts)) for place in order if mistakes.flat[place]]
    body = [
        row(run.class_name(k), (run.class_name(j), count(float(counts[k, j])), percent(counts[k, j] / counts[k].sum())))
        for k, j in pairs
    ]
    return table(header_row(("label", "predicted as", "images", "of the label’s")), body)


def _finding(run: Run, order: Sequence[int], gains: Floats | None) -> str:
    if not order:
        return f"No class has {run.scored} images."
    if gains is None:
        return "Gains need a student alone and a co-advised one; without both, classes are sorted by accuracy."
    gained, lost = sum(gains[k] > 0 for k in order), sum(gains[k] < 0 for k in order)
    first, last = order[0], order[-1]
    return (
        f"{gained} of {len(order)} classes gained from advice and {lost} lost. Largest gain: {run.class_name(first)} "
        f"({points(gains[first])} points); smallest: {run.class_name(last)} ({points(gains[last])})."
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
    return tag("figure", *rows, axis_row(x, lambda v: percent(v, 0)), class_="dots")


def agreements(run: Run) -> Markup:
    """The share of images for which two predictors choose the same class, as a lower triangle."""
    found = comparable(run, predictors(run))
    if len(found) < 2:
        return paragraph("missing", "This needs the predictions of at least two networks, which are not there yet.")
    shares = agreement(run, found)
    below = [float(shares[i, j]) for i in range(len(found)) for j in range(i)]
    low, high = min(below), max(below)
    body = []
    for i, predictor in enumerate(found[1:], start=1):
        cells = [tag("td")] * (len(found) - 1)
        for j in range(i):
            strength = (shares[i, j] - low) / (high - low) if high > low else 0.5
            style, title = f"--a:{0.06 + 0.5 * strength:.2f}", f"{predictor.name} and {found[j].name}"
            cells[j] = tag("td", percent(float(shares[i, j]), 0), style=style, title=title)
        body.append(row(predictor.name, cells))
    head = tag("tr", tag("td"), *(tag("th", predictor.name, scope="col") for predictor in found[:-1]))
    images = count(len(run.predictions[found[0].part].labels))
    note = (
        f"Share of {images} {run.scored} images with the same prediction, right or wrong. Students of the first seed."
    )
    return join([table(head, body, "matrix"), paragraph("note", note), divergences(run)])


def divergences(run: Run) -> Markup:
    """The distance of each student's output from each teacher (Table 5 of the paper), averaged over seeds."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in map(mapping, sequence(run.last("verdict").get("divergences"))):
        kl, (group, _) = number(record.get("kl")), group_of(str(record.get("part")))
        if kl is not None:
            by_teacher = found.setdefault((group, str(record.get("answer"))), {})
            by_teacher.setdefault(str(record.get("teacher")), []).append(kl)
    if not found:
        return Markup()
    teachers = list(dict.fromkeys(teacher for by_teacher in found.values() for teacher in by_teacher))
    names = {ADVISED: "co-advised", ALONE: "alone"}
    body = [
        row(
            f"student {names.get(group, group)}, {output}",
            (f"{np.mean(by_teacher[teacher]):.3f}" if teacher in by_teacher else "–" for teacher in teachers),
        )
        for (group, output), by_teacher in sorted(found.items(), key=lambda item: item[0][0] != ALONE)
    ]
    note = "KL divergence from the teacher’s probabilities to the output’s, in nats, mean over images and seeds."
    head = header_row(("", *(teacher_name(run, f"teachers/{teacher}") for teacher in teachers)))
    return join([tag("h3", "Distance from each teacher"), table(head, body), paragraph("note", note)])
