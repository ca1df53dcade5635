"""The page of a comparison of runs: their accuracies, differences, learning curves and configurations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coadvise.report.charts import Bar, Dot, Series, axis_row, dot_row, fit_scale, line_chart, track
from coadvise.report.curves import curves, group_series
from coadvise.report.document import document
from coadvise.report.markup import Markup, count, header_row, join, paragraph, percent, points, row, table, tag
from coadvise.report.predictors import TONES
from coadvise.report.read import ADVISED, read_run


def render(result: Mapping[str, Any], runs: Sequence[Path]) -> str:
    """The whole page as one string.

    Args:
        result: what `runs.compare.compare` returns.
        runs: the run directories, in the same order.
    """
    pooled = result["pooled"]
    said = pooled["sentence"] if pooled else f"{len(runs)} runs beside each other"
    top = (tag("h1", said), paragraph("lead", _lead(result)))
    sections = (
        ("accuracy", "Accuracy", "How accurate is each?", _accuracies(result)),
        ("differences", "Differences", "How far is each from the first?", _differences(result)),
        ("learning", "Learning", "How did the co-advised students learn?", _learning(runs)),
        ("changes", "Changes", "What differs in the configuration?", _changes(result)),
    )
    return document("coadvise compare", top, sections, "Made from the records of the runs.")


def _lead(result: Mapping[str, Any]) -> str:
    pooled, lead = result["pooled"], result["lead"]
    said = "Two or more of them need a baseline (--baseline) for a sentence about advice."
    if pooled:
        pictures = f"{count(pooled['images'])} pictures of {pooled['runs']} runs"
        said = f"Over {pictures}; a picture that several runs score counts once."
    return said + (f" {lead['sentence']}" if lead else "")


def _names(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for found in result["runs"] for name in found["top1"]))


def _title(name: str) -> str:
    return {"advised": "co-advised", "alone": "student alone"}.get(name, f"{name.removeprefix('teachers/')} teacher")


def _accuracies(result: Mapping[str, Any]) -> Markup:
    names = _names(result)
    body = [
        row(Path(found["run"]).name, [count(found["images"]), *(percent(found["top1"].get(name)) for name in names)])
        for found in result["runs"]
    ]
    if pooled := result["pooled"]:
        means = [percent(pooled["top1"].get(name)) for name in names]
        body.append(row("mean", [count(pooled["images"]), *means], "chief"))
    return table(header_row(("", "pictures", *map(_title, names))), body)


def _differences(result: Mapping[str, Any]) -> Markup:
    first, *others = result["runs"]
    drawn: list[tuple[str, Mapping[str, float]]] = []
    apart = []
    for found in others:
        if not found["same_pictures"]:
            apart.append(Path(found["run"]).name)
        drawn += [
            (f"{Path(found['run']).name}: {_title(name)}", each) for name, each in found["differences"].items() if each
        ]
    parts = []
    if drawn:
        x = fit_scale([edge for _, each in drawn for edge in (each["low"], each["high"])], include=(0.0,))
        rows = []
        for name, each in drawn:
            look = "tone-gain" if each["low"] > 0 else "tone-loss" if each["high"] < 0 else "tone-alone"
            dot, bar = (
                Dot(each["mean"], "dot", look, points(each["mean"])),
                Bar(each["low"], each["high"], "band", look),
            )
            rows.append(dot_row(name, track(x, [dot], [bar], zero=True), points(each["mean"])))
        note = paragraph("note", f"Points above {Path(first['run']).name}, paired over images, with 95 % intervals.")
        parts.append(tag("figure", *rows, axis_row(x, lambda v: f"{100 * v:+.3g}"), note, class_="dots wide-names"))
    if apart:
        parts.append(
            paragraph("note", f"Scored on other pictures, so not compared image by image: {', '.join(apart)}.")
        )
    return join(parts)


def _learning(runs: Sequence[Path]) -> Markup:
    series: list[Series] = []
    for place, folder in enumerate(runs):
        found = curves(read_run(folder), "eval", "top1", "class")
        lines = group_series(found, ADVISED, folder.name, f"tone-{place % TONES}")
        series += [line for line in lines if not line.faint]
    if not series:
        return paragraph("missing", "No accuracy was recorded during training.")
    return line_chart(
        series, title="Accuracy of the class token on the validation images", read=percent,
        mark=lambda value: f"{100 * value:.3g} %", height=260,
    )  # fmt: skip


def _changes(result: Mapping[str, Any]) -> Markup:
    first, *others = result["runs"]
    parts = []
    for found in others:
        changes = found["changes"] or ["nothing"]
        parts.append(tag("h3", f"{Path(first['run']).name} to {Path(found['run']).name}"))
        parts.append(tag("ul", *(tag("li", tag("code", change)) for change in changes)))
    return join(parts)
