"""Did advice help? The sentence, the difference with its intervals, and every row of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coadvise.report.charts import Bar, Dot, Scale, axis_row, dot_row, fit_scale, key, track
from coadvise.report.exports import exports
from coadvise.report.markup import Markup, compact, count, header_row, join, paragraph, percent, points, row, table, tag
from coadvise.report.predictors import score, teacher_name, tone, wilson_interval
from coadvise.report.read import ADVISED, ALONE, AVERAGE, START, Record, Run, group_of, mapping, number, sequence

Span = tuple[float, float, float]  # a mean and its 95 % interval, as shares


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a teacher, a student alone or its start, or one output of the co-advised student.

    Attributes:
        difference: the gain in top-1 over the student alone, with its interval over images.
        over_seeds: the same with its interval over seeds.
        macro: the mean of the classes' accuracies.
    """

    name: str
    group: str
    token: str
    top1: float
    spread: float | None
    parameters: float | None
    images_per_second: float | None
    difference: Span | None
    over_seeds: Span | None
    macro: float | None = None

    @property
    def shape(self) -> str:
        """Its marker: a square for a teacher, a ring for the student alone, a dot for the co-advised one."""
        if self.group.startswith("teachers"):  # one of them, or their average
            return "square"
        return "ring" if self.group in (ALONE, START) else "dot"

    def tone(self, run: Run) -> str:
        if self.shape == "ring":
            return "tone-alone"
        of_one = self.group.startswith("teachers/")
        return tone(run, self.group.removeprefix("teachers/") if of_one else self.token)


def rows_of(run: Run) -> list[Row]:
    """The verdict's rows. Before there is a verdict, one row for each output that a part has been scored on."""
    rows = []
    for record in map(mapping, sequence(run.last("verdict").get("rows"))):
        group, _ = group_of(str(record.get("part", "")))
        rows.append(_row(str(record.get("name", group)), group, str(record.get("answer", "class")), record))
    if not rows:
        latest = {str(record.get("part")): record for record in run.of("eval")} | run.results
        for part in run.parts:
            record, (group, seed) = latest.get(part, {}), group_of(part)
            for token in mapping(record.get("top1")):
                output = f"{token}{'' if token == AVERAGE else ' token'}"
                who = {ADVISED: f"student co-advised ({output})", ALONE: "student alone"}.get(group)
                several = sum(group_of(other)[0] == group for other in run.parts) > 1
                name = f"{who}, seed {seed}" if who and several else who or teacher_name(run, part)
                value = {**record, "top1": mapping(record.get("top1")).get(token)}
                rows.append(_row(name, group, token, value))
    return [row for row in rows if row is not None]


def _row(name: str, group: str, token: str, record: Record) -> Row | None:
    top1 = number(record.get("top1"))
    if top1 is None:
        return None
    spread, parameters, speed = (number(record.get(field)) for field in ("spread", "parameters", "images_per_second"))
    difference = mapping(record.get("difference"))
    spans = _span(difference), _span(mapping(difference.get("seeds")))
    return Row(name, group, token, top1, spread, parameters, speed, *spans, number(record.get("macro_accuracy")))


def _span(record: Record) -> Span | None:
    mean, low, high = (number(record.get(field)) for field in ("mean", "low", "high"))
    return None if mean is None or low is None or high is None else (mean, low, high)


def state_of(run: Run) -> str:
    """The progress of a run without a verdict, in one sentence."""
    open_parts = [part for part in run.parts if part not in run.results]
    if not run.parts:
        return "Nothing has been trained yet."
    if not open_parts:
        return f"All {len(run.parts)} networks started so far are finished; there is no verdict yet."
    epochs = [number(r.get("epoch")) for r in run.records if r.get("part") == open_parts[-1]]
    reached = max((epoch for epoch in epochs if epoch is not None), default=None)
    where = f" (epoch {reached:.4g})" if reached is not None else ""
    done = len(run.parts) - len(open_parts)
    return f"{done} of {len(run.parts)} networks started so far are finished; the last record: {open_parts[-1]}{where}."


def headline(run: Run) -> Markup:
    """The verdict's sentence and the difference behind it; without them, what is missing."""
    verdict = run.last("verdict")
    difference = mapping(verdict.get("difference"))
    over_images, over_seeds = _span(difference), mapping(difference.get("seeds"))
    if not verdict:
        return join([tag("h1", "No verdict yet"), paragraph("lead", state_of(run))])
    sentence = tag("h1", str(verdict.get("sentence") or "All networks are trained and scored"))
    remark = [paragraph("lead", str(verdict["remark"]))] if verdict.get("remark") else []
    if over_images is None:
        why = "No student was trained without advice, so there is no baseline for the co-advised student."
        return join([sentence, paragraph("lead", why), *remark])
    spans = [(f"over {difference.get('over') or 'images'}", over_images)]
    if span := _span(over_seeds):
        spans.append((f"over {count(number(over_seeds.get('n')))} seeds", span))
    mean, low, high = over_images
    look = "tone-gain" if low > 0 else "tone-loss" if high < 0 else "tone-alone"
    big = tag("p", tag("b", points(mean), class_=look), tag("span", "points of top-1 from advice"), class_="big")
    return join([sentence, *remark, tag("div", big, _difference(spans, look), class_="difference")])


def _difference(spans: Sequence[tuple[str, Span]], look: str) -> Markup:
    x = fit_scale([edge for _, (_, low, high) in spans for edge in (low, high)], include=(0.0,))
    rows = []
    for name, (mean, low, high) in spans:
        drawing = track(x, [Dot(mean, "dot", look, points(mean))], [Bar(low, high, "band", look)], zero=True)
        rows.append(dot_row(name, drawing, f"{points(low)} to {points(high)}"))
    note = paragraph(
        "note", "Co-advised minus alone, in points, with the 95 % interval. At zero, advice has no effect."
    )
    return tag("figure", *rows, axis_row(x, _signed), note, class_="dots")


def _signed(value: float) -> str:
    return f"{100 * value:+.3g}".replace("-", "−") if value else "0"


def comparison(run: Run) -> Markup:
    """The dot plot of top-1 and the table of the same rows."""
    rows = rows_of(run)
    if not rows:
        return paragraph("missing", "No accuracy has been measured yet.")
    images = number(run.last("verdict").get("images"))
    unbalanced = bool(mapping(run.last("verdict").get("macro_difference")))
    return join([_dots(run, rows, images), _table(rows, unbalanced), _parts(run), exports(run)])


def _dots(run: Run, rows: Sequence[Row], images: float | None) -> Markup:
    ranges = {row: wilson_interval(row.top1, images) for row in rows} if images else {}
    x = fit_scale([edge for row in rows for edge in (row.top1, *ranges.get(row, ()))])
    drawn = [dot_row(row.name, _row_track(run, row, x, ranges.get(row)), percent(row.top1)) for row in rows]
    legend = tag(
        "ul",
        key("square", "tone-total", "teacher"),
        key("ring", "tone-alone", "student alone"),
        key("dot", "tone-student", "student co-advised"),
        class_="legend",
    )
    notes = [f"Top-1 on {count(images)} {run.scored} images; the line is the 95 % interval over images."] * bool(images)
    if not run.last("verdict"):
        notes.append("The latest top-1 of each network so far.")
    if any(row.spread for row in rows):
        seeds = len(sequence(run.last("verdict").get("seeds")))
        notes.append(f"The pale band is the standard deviation over {seeds} seeds.")
    note = paragraph("note", " ".join(notes))
    return tag("figure", legend, *drawn, axis_row(x, _whole), note, class_="dots wide-names")


def _row_track(run: Run, row: Row, x: Scale, span: tuple[float, float] | None) -> Markup:
    look = row.tone(run)
    bars = [Bar(row.top1 - row.spread, row.top1 + row.spread, "band", look)] if row.spread else []
    bars += [Bar(*span, "whisker", look)] if span else []
    return track(x, [Dot(row.top1, row.shape, look, f"{row.name}: {percent(row.top1)}")], bars)


def _whole(value: float) -> str:
    return f"{100 * value:.3g}\u00a0%"


def _table(rows: Sequence[Row], unbalanced: bool) -> Markup:
    compared = any(row.difference for row in rows)
    several = any(row.over_seeds for row in rows)
    gains = [*["gain over alone"] * compared, *["over seeds"] * several]
    head = header_row(("", "top-1", "std over seeds", *gains, *["macro"] * unbalanced, "parameters", "images/s"))
    body = []
    for each in rows:
        cells = [percent(each.top1), f"± {100 * each.spread:.1f}" if each.spread is not None else "–"]
        cells += [_gain(span) for span in (each.difference, each.over_seeds)[: len(gains)]]
        cells += [percent(each.macro)] * unbalanced
        cells += [compact(each.parameters), count(each.images_per_second)]
        main = each.group == ADVISED and each.token == "class"
        body.append(row(each.name, cells, "chief" if main else None))
    if not compared:
        return table(head, body)
    intervals = "95 % interval over images" + ", then with the one over seeds" * several
    note = f"Gain over alone: top-1 minus that of the student alone, in points, with the {intervals}."
    if unbalanced:
        note += " Macro: the mean of the classes' accuracies, since they are of unequal size."
    return join([table(head, body), paragraph("note", note)])


def _gain(span: Span | None) -> str:
    return f"{points(span[0])} ({points(span[1])} to {points(span[2])})" if span else "–"


def _parts(run: Run) -> Markup:
    """Every trained network with its scores."""
    if not run.results:
        return Markup()
    body = []
    calibrated = any(score(record.get("temperature")) is not None for record in run.results.values())
    figures = ("top1", "top5", "ece", *["calibrated_ece"] * calibrated)
    for part, record in sorted(run.results.items(), key=lambda item: run.parts.index(item[0])):
        nll = score(record.get("nll"))
        cells = [tag("td", str(record.get("model") or "–"), class_="text")]
        cells += [tag("td", percent(score(record.get(figure)))) for figure in figures]
        cells += [tag("td", "–" if nll is None else f"{nll:.3f}"), tag("td", compact(number(record.get("parameters"))))]
        body.append(row(part, cells))
    errors = ("calibration error", *["with temperature"] * calibrated)
    head = header_row(("network", "model", "top-1", "top-5", *errors, "log loss", "parameters"))
    note = (
        "Scores of the class token. Calibration error: the distance between confidence and accuracy, mean over 15 bins "
        "of confidence weighted by their images. Log loss: minus the log-probability of the true class, mean, in nats."
    )
    if calibrated:
        note += " With temperature: logits are divided by a temperature fitted on the validation images."
    summary = tag("summary", f"All {len(body)} trained networks")
    return tag("details", summary, table(head, body), paragraph("note", note))
