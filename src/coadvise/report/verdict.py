"""Did advice help? The sentence, the difference with its interval, and every row of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coadvise.report.answers import interval, score, teacher_name, tone
from coadvise.report.charts import Bar, Dot, Scale, axis, dot_row, fit_scale, key, track
from coadvise.report.markup import Markup, compact, count, join, percent, points, tag
from coadvise.report.read import ADVISED, ALONE, AVERAGE, Record, Run, group_of, mapping, number, sequence

Span = tuple[float, float, float]  # a mean and its 95 % interval, as shares


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a teacher, a student alone, or one answer of the co-advised student."""

    name: str
    group: str
    token: str
    top1: float
    spread: float | None
    parameters: float | None
    images_per_second: float | None
    difference: Span | None  # top-1 more than the student alone, with its interval over images
    over_seeds: Span | None  # the same with that over seeds

    @property
    def shape(self) -> str:
        """Its marker: a square for a teacher, a ring for the student alone, a dot for the co-advised one."""
        return "square" if self.group.startswith("teachers/") else "ring" if self.group == ALONE else "dot"

    def tone(self, run: Run) -> str:
        """Its colour."""
        if self.group == ALONE:
            return "tone-alone"
        return tone(run, self.group.removeprefix("teachers/") if self.shape == "square" else self.token)


def rows_of(run: Run) -> list[Row]:
    """The verdict's rows; before there is a verdict, one row for each answer that a part has measured so far."""
    rows = []
    for record in map(mapping, sequence(run.last("verdict").get("rows"))):
        group, _ = group_of(str(record.get("part", "")))
        rows.append(_row(str(record.get("name", group)), group, str(record.get("answer", "class")), record))
    if not rows:
        latest = {str(record.get("part")): record for record in run.of("eval")} | run.results
        for part in run.parts:
            record, (group, seed) = latest.get(part, {}), group_of(part)
            for token in mapping(record.get("top1")):
                answer = f"{token}{'' if token == AVERAGE else ' token'}"
                who = {ADVISED: f"student co-advised ({answer})", ALONE: "student alone"}.get(group)
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
    return Row(name, group, token, top1, spread, parameters, speed, *spans)


def _span(record: Record) -> Span | None:
    mean, low, high = (number(record.get(field)) for field in ("mean", "low", "high"))
    return None if mean is None or low is None or high is None else (mean, low, high)


def state_of(run: Run) -> str:
    """What a run without a verdict has done so far, in one sentence."""
    open_parts = [part for part in run.parts if part not in run.results]
    if not run.parts:
        return "Nothing has been trained yet."
    if not open_parts:
        return f"Every part begun is finished ({len(run.parts)}); the verdict has not been written."
    epochs = [number(r.get("epoch")) for r in run.records if r.get("part") == open_parts[-1]]
    reached = max((epoch for epoch in epochs if epoch is not None), default=None)
    where = f" (epoch {reached:.4g})" if reached is not None else ""
    done = len(run.parts) - len(open_parts)
    return f"{done} of {len(run.parts)} parts begun are finished; the last record is of {open_parts[-1]}{where}."


def headline(run: Run) -> Markup:
    """The verdict's sentence and the difference it rests on; without them, what is missing."""
    verdict = run.last("verdict")
    difference = mapping(verdict.get("difference"))
    over_images, over = _span(difference), mapping(difference.get("seeds"))
    if not verdict:
        return join([tag("h1", "No verdict yet"), tag("p", state_of(run), class_="lead")])
    sentence = tag("h1", str(verdict.get("sentence") or "The parts are measured"))
    remark = [tag("p", str(verdict["remark"]), class_="lead")] if verdict.get("remark") else []
    if over_images is None:
        why = "No student was trained without advice, so there is nothing to set the co-advised student against."
        return join([sentence, tag("p", why, class_="lead"), *remark])
    spans = [(f"over {difference.get('over') or 'images'}", over_images)]
    if over_seeds := _span(over):
        spans.append((f"over {count(number(over.get('n')))} seeds", over_seeds))
    mean, low, high = over_images
    verdict_tone = "tone-gain" if low > 0 else "tone-loss" if high < 0 else "tone-alone"
    big = tag(
        "p", tag("b", points(mean), class_=verdict_tone), tag("span", "points of top-1 from advice"), class_="big"
    )
    return join([sentence, *remark, tag("div", big, _difference(spans, verdict_tone), class_="difference")])


def _difference(spans: Sequence[tuple[str, Span]], verdict_tone: str) -> Markup:
    x = fit_scale([edge for _, (_, low, high) in spans for edge in (low, high)], include=(0.0,))
    rows = [
        dot_row(
            name,
            track(x, [Dot(mean, "dot", verdict_tone, points(mean))], [Bar(low, high, "band", verdict_tone)], zero=True),
            f"{points(low)} to {points(high)}",
        )
        for name, (mean, low, high) in spans
    ]
    note = "Co-advised minus alone, points, with its 95 % interval. Zero is no help."
    return tag(
        "figure", *rows, dot_row("", axis(x, _signed), "", kind="axis"), tag("p", note, class_="note"), class_="dots"
    )


def _signed(value: float) -> str:
    return f"{100 * value:+.3g}".replace("-", "−") if value else "0"


def comparison(run: Run) -> Markup:
    """The dot plot of top-1 and the table of the same rows."""
    rows = rows_of(run)
    if not rows:
        return tag("p", "No accuracy has been measured yet.", class_="missing")
    images = number(run.last("verdict").get("images"))
    return join([_dots(run, rows, images), _table(rows), _parts(run)])


def _dots(run: Run, rows: Sequence[Row], images: float | None) -> Markup:
    ranges = {row: interval(row.top1, images) for row in rows} if images else {}
    x = fit_scale([edge for row in rows for edge in (row.top1, *ranges.get(row, ()))])
    drawn = [dot_row(row.name, _row_track(run, row, x, ranges.get(row)), percent(row.top1)) for row in rows]
    legend = tag(
        "ul",
        key("square", "tone-total", "teacher"),
        key("ring", "tone-alone", "student alone"),
        key("dot", "tone-student", "student co-advised"),
        class_="legend",
    )
    seeds = sequence(run.last("verdict").get("seeds"))
    notes = (
        [f"Top-1 on {count(images)} validation images; the line is the 95 % interval over images."] if images else []
    )
    if not run.last("verdict"):
        notes.append("The latest top-1 of each part so far.")
    if any(row.spread for row in rows):
        notes.append(f"The pale band is the spread over {len(seeds)} seeds.")
    note = tag("p", " ".join(notes), class_="note")
    return tag("figure", legend, *drawn, dot_row("", axis(x, _whole), "", kind="axis"), note, class_="dots wide-names")


def _row_track(run: Run, row: Row, x: Scale, span: tuple[float, float] | None) -> Markup:
    look = row.tone(run)
    bars = [Bar(row.top1 - row.spread, row.top1 + row.spread, "band", look)] if row.spread else []
    bars += [Bar(*span, "whisker", look)] if span else []
    return track(x, [Dot(row.top1, row.shape, look, f"{row.name}: {percent(row.top1)}")], bars)


def _whole(value: float) -> str:
    return f"{100 * value:.3g}\u00a0%"


def _table(rows: Sequence[Row]) -> Markup:
    compared = any(row.difference for row in rows)
    several = any(row.over_seeds for row in rows)
    gains = [*["to alone"] * compared, *["over seeds"] * several]
    head = ("", "top-1", "spread over seeds", *gains, "parameters", "images/s")
    body = [
        tag(
            "tr",
            tag("th", row.name, scope="row"),
            tag("td", percent(row.top1)),
            tag("td", f"± {100 * row.spread:.1f}" if row.spread is not None else "–"),
            *(tag("td", _gain(span)) for span in (row.difference, row.over_seeds)[: len(gains)]),
            tag("td", compact(row.parameters)),
            tag("td", count(row.images_per_second)),
            class_="chief" if row.group == ADVISED and row.token == "class" else None,
        )
        for row in rows
    ]
    intervals = "95 % interval over images" + ", and beside it the one over seeds" * several
    note = f"To alone: points of top-1 more than the student alone has, with the {intervals}."
    return join([table(head, body), tag("p", note, class_="note")]) if compared else table(head, body)


def _gain(span: Span | None) -> str:
    return f"{points(span[0])} ({points(span[1])} to {points(span[2])})" if span else "–"


def table(head: Sequence[str], body: Sequence[Markup]) -> Markup:
    """A table that scrolls by itself where the screen is too narrow for it."""
    columns = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head)))
    return tag("div", tag("table", columns, tag("tbody", *body)), class_="scroll", tabindex="0")


def _parts(run: Run) -> Markup:
    """Every trained part with what it is and its scores."""
    if not run.results:
        return Markup()
    body = [
        tag(
            "tr",
            tag("th", part, scope="row"),
            tag("td", str(record.get("model") or "–"), class_="text"),
            tag("td", percent(score(record.get("top1")))),
            tag("td", percent(score(record.get("top5")))),
            tag("td", percent(score(record.get("ece")))),
            tag("td", _nats(score(record.get("nll")))),
            tag("td", compact(number(record.get("parameters")))),
        )
        for part, record in sorted(run.results.items(), key=lambda item: run.parts.index(item[0]))
    ]
    head = ("part", "model", "top-1", "top-5", "calibration error", "log loss", "parameters")
    note = (
        "Of the class token’s answer. Calibration error: how far confidence is from accuracy, mean over 15 bins of "
        "confidence weighted by their images. Log loss: minus the log-probability of the truth, mean in nats."
    )
    summary = tag("summary", f"Each of the {len(body)} trained parts")
    return tag("details", summary, table(head, body), tag("p", note, class_="note"))


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
