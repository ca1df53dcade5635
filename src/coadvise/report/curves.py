"""How did each network learn? Accuracies and every named loss against epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coadvise.report.charts import Level, Point, Series, line_chart
from coadvise.report.markup import Markup, join, paragraph, percent, tag
from coadvise.report.predictors import score, teacher_name, tone
from coadvise.report.read import ADVISED, ALONE, AVERAGE, Run, group_of, mapping, number

Curves = Mapping[str, Mapping[float, float]]  # part -> epoch -> value


def curves(run: Run, kind: str, field: str, name: str) -> dict[str, dict[float, float]]:
    """One number of every part against epochs. A resumed run records an epoch twice; the later record counts."""
    found: dict[str, dict[float, float]] = {}
    for record in run.of(kind):
        epoch, value = number(record.get("epoch")), number(mapping(record.get(field)).get(name))
        if epoch is not None and value is not None:
            found.setdefault(str(record.get("part")), {})[epoch] = value
    return found


def mean_curve(lines: Sequence[Mapping[float, float]]) -> list[Point]:
    """The mean, at the epochs that all lines have."""
    shared = set.intersection(*(set(line) for line in lines)) if lines else set()
    return [(epoch, sum(line[epoch] for line in lines) / len(lines)) for epoch in sorted(shared)]


def group_series(found: Curves, group: str, label: str, look: str) -> list[Series]:
    """A group's mean over seeds and, if there are several, each seed as a faint line."""
    lines = [sorted(line.items()) for part, line in found.items() if group_of(part)[0] == group]
    if not lines:
        return []
    mean = mean_curve([dict(line) for line in lines])
    faint = [Series(f"{label}, one seed", look, line, faint=True) for line in lines] if len(lines) > 1 else []
    return [Series(label, look, mean or lines[0]), *faint]


def names(run: Run, kind: str, field: str, group: str) -> list[str]:
    """The names recorded for a group, for instance of its losses, in their order."""
    records = [record for record in run.of(kind) if group_of(str(record.get("part")))[0] == group]
    return list(dict.fromkeys(str(name) for record in records for name in mapping(record.get(field))))


def learning(run: Run) -> Markup:
    """A large chart of the co-advised student and the student alone; small ones of tokens, teachers and losses."""
    if not run.of("train") and not run.of("eval"):
        return paragraph("missing", "No training step has been recorded yet.")
    small = [*_token_accuracies(run), *_losses(run)]
    large = _advised_against_alone(run)
    seeds = {seed for _, seed in map(group_of, run.parts) if seed is not None}
    note = paragraph("note", "Thick lines are means over seeds, thin lines single seeds.") if len(seeds) > 1 else ""
    return join([large, note, tag("div", *small, class_="multiples")])


def _accuracy_chart(series: Sequence[Series], title: str, height: int = 150, levels: Sequence[Level] = ()) -> Markup:
    def mark(value: float) -> str:
        return f"{100 * value:.3g} %"

    return line_chart(series, title=title, read=percent, mark=mark, height=height, levels=levels)


def _advised_against_alone(run: Run) -> Markup:
    found = curves(run, "eval", "top1", "class")
    series = group_series(found, ADVISED, "co-advised", "tone-student")
    series += group_series(found, ALONE, "alone", "tone-alone")
    levels = []
    for part, record in run.results.items():
        value = score(record.get("top1"))
        if part.startswith("teachers/") and value is not None:
            levels.append(Level(f"{teacher_name(run, part)}, final", tone(run, part.removeprefix("teachers/")), value))
    return _accuracy_chart(series, "Accuracy of the student’s class token on the validation images", 260, levels)


def _token_accuracies(run: Run) -> list[Markup]:
    charts = []
    tokens = names(run, "eval", "top1", ADVISED)
    if len(tokens) > 1:
        series = []
        for token in tokens:
            label = token if token == AVERAGE else f"{token} token"
            series += group_series(curves(run, "eval", "top1", token), ADVISED, label, tone(run, token))
        means = [line for line in series if not line.faint]
        charts.append(_accuracy_chart(means, "Accuracy: co-advised student"))
    found = curves(run, "eval", "top1", "class")
    teachers = [part for part in run.parts if part.startswith("teachers/") and part in found]
    if teachers:
        series = [
            Series(teacher_name(run, part), tone(run, part.removeprefix("teachers/")), sorted(found[part].items()))
            for part in teachers
        ]
        charts.append(_accuracy_chart(series, "Accuracy: teachers"))
    return charts


def _losses(run: Run) -> list[Markup]:
    groups = dict.fromkeys(group_of(part)[0] for part in run.parts)
    order = sorted(groups, key=lambda group: group != ADVISED)  # the co-advised student's losses come first
    return [_loss_chart(run, group) for group in order if names(run, "train", "losses", group)]


def _loss_chart(run: Run, group: str) -> Markup:
    found = {name: curves(run, "train", "losses", name) for name in names(run, "train", "losses", group)}
    lines = {name: group_series(parts, group, name, _loss_tone(run, group, name)) for name, parts in found.items()}
    if set(lines) == {"total", "class"} and [s.points for s in lines["total"]] == [s.points for s in lines["class"]]:
        del lines["total"]  # the same loss under two names
    who = {ADVISED: "co-advised student", ALONE: "student alone"}.get(group) or teacher_name(run, group)
    return line_chart(
        [line for series in lines.values() for line in series],
        title=f"{'Losses' if len(lines) > 1 else 'Loss'}: {who}",
        read="{:.3g}".format,
        mark="{:.3g}".format,
        include=(0.0,),
    )


def _loss_tone(run: Run, group: str, name: str) -> str:
    if name != "class" or group == ADVISED:
        return tone(run, name)
    return "tone-alone" if group == ALONE else tone(run, group.removeprefix("teachers/"))
