"""Which networks were exported to ONNX: accuracy over speed."""

from __future__ import annotations

from coadvise.report.markup import Markup, compact, count, header_row, join, paragraph, percent, row, table, tag
from coadvise.report.predictors import teacher_name
from coadvise.report.read import ADVISED, ALONE, Record, Run, group_of, number
from coadvise.report.scatter import Point, scatter

KINDS = {"students/": "students", "teachers/": "teachers"}


def exports(run: Run) -> Markup:
    """The newest export of each network, token and precision; nothing if there is none."""
    newest = {(str(r.get("part")), str(r.get("answer")), bool(r.get("int8"))): r for r in run.of("export")}
    if not newest:
        return Markup()
    body = []
    for record in newest.values():
        size, speed = number(record.get("bytes")), number(record.get("images_per_second"))
        cells = [tag("td", str(record.get("file") or "–"), class_="text")]
        body.append(row(_name(run, record), [*cells, percent(number(record.get("top1"))), count(speed), compact(size)]))
    head = header_row(("exported", "file", "top-1", "images/s", "bytes"))
    note = f"Speed of the network alone in ONNX Runtime on the machine that exported it. Top-1 on {run.scored} images."
    return join(
        [tag("h3", "Exported files"), _picture(run, [*newest.values()]), table(head, body), paragraph("note", note)]
    )


def _name(run: Run, record: Record) -> str:
    part, answer = str(record.get("part")), str(record.get("answer"))
    group, _ = group_of(part)
    who = {ADVISED: f"student co-advised ({answer})", ALONE: "student alone"}.get(group) or teacher_name(run, part)
    return f"{who}, int8" if record.get("int8") else who


def _picture(run: Run, records: list[Record]) -> Markup:
    """Of two exports or more."""
    series: dict[str, list[Point]] = {}
    for record in records:
        speed, top1 = number(record.get("images_per_second")), number(record.get("top1"))
        kind = next((name for start, name in KINDS.items() if str(record.get("part")).startswith(start)), "others")
        if speed is not None and top1 is not None:
            series.setdefault(kind, []).append(Point(speed, 100 * top1, _name(run, record)))
    if sum(map(len, series.values())) < 2:
        return Markup()
    title = "Accuracy over speed of the exported networks"
    drawing = scatter(series, title, "images/s in ONNX Runtime", "top-1, %", joined=False, least=1)
    return tag("figure", Markup(drawing), class_="picture")
