"""The result of a study: every column of every row, the paper's claims judged, a table, a figure."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from coadvise.evaluation.verdict import Interval, direction, paired_interval, seed_interval, spread
from coadvise.report.scatter import Point, scatter
from coadvise.studies import Order, Study
from coadvise.studies.columns import Column
from coadvise.studies.measures import Finished, Value, measure
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.metrics import last_of, read_records

HELD, NOT_HELD, NOISE = "held", "not held", "within noise"


def measured(study: Study, finished: Mapping[str, Finished], engine: Engine, listener: Listener) -> dict[str, Any]:
    """Measures all columns.

    Args:
        finished: the trained networks by row.

    Returns:
        What `NAME.json` holds: {"title", "columns": [{"name", "heading", "scale", "digits", "unit", "note"}], "rows":
        [{"name", "run", "figures": {column: {"seeds": {seed: figure}, "mean", "spread", "paper"}}}], "orders":
        [{"higher", "lower", "column", "finding", "difference", "over": {"images", "seeds"}}]}, and its origin.
        Figures are as measured (shares, counts), the paper's as printed there.
    """
    values = {
        column.name: dict(zip(finished, measure(column, list(finished.values()), engine, listener), strict=True))
        for column in study.columns
    }
    rows = [
        {
            "name": row.name,
            "run": str(finished[row.name].run),
            "figures": {
                name: {**_summary(of_rows[row.name]), "paper": row.paper.get(name)} for name, of_rows in values.items()
            },
        }
        for row in study.rows
    ]
    orders = [_compared(order, values[order.column]) for order in study.orders]
    record = last_of(read_records(next(iter(finished.values())).run), "run") or {}
    made_by = {key: record.get(key) for key in ("time", "version", "versions", "device", "command")}
    columns = [_described(column) for column in study.columns]
    return {"title": study.title, "columns": columns, "rows": rows, "orders": orders, **made_by}


def _described(column: Column) -> dict[str, Any]:
    return {key: getattr(column, key) for key in ("name", "heading", "scale", "digits", "unit", "note")}


def _summary(by_seed: Mapping[int, Value]) -> dict[str, Any]:
    means = {str(seed): float(np.mean(value)) for seed, value in by_seed.items()}
    return {"seeds": means, "mean": sum(means.values()) / len(means), "spread": spread(list(means.values()))}


def _compared(order: Order, values: Mapping[str, Mapping[int, Value]]) -> dict[str, Any]:
    """Judges a claim by the seeds that both rows have: held, or not, only if no interval contains zero."""
    higher, lower = values[order.higher], values[order.lower]
    seeds = sorted(higher.keys() & lower.keys())
    differences = [float(np.mean(higher[seed]) - np.mean(lower[seed])) for seed in seeds]
    by_image = [[v for seed in seeds if isinstance(v := row[seed], np.ndarray)] for row in (higher, lower)]
    over: dict[str, Interval | None] = {
        "images": paired_interval(*by_image) if all(by_image) else None,
        "seeds": seed_interval(differences),
    }
    found = direction([interval for interval in over.values() if interval])
    return {
        **asdict(order),
        "finding": {1: HELD, -1: NOT_HELD, 0: NOISE}[found],
        "difference": sum(differences) / len(differences),
        "over": {name: asdict(interval) if interval else None for name, interval in over.items()},
    }


def markdown(result: Mapping[str, Any]) -> Iterator[str]:
    """The table, its notes and the claims, line by line."""
    columns = {column["name"]: column for column in result["columns"]}
    given = {name for row in result["rows"] for name, figure in row["figures"].items() if figure["paper"] is not None}
    heads = ["row"]
    for name, column in columns.items():
        heads += [column["heading"], "the paper, ImageNet-1k"] if name in given else [column["heading"]]
    yield f"# {result['title']}"
    yield ""
    yield from _table_head(heads)
    for row in result["rows"]:
        cells = [row["name"]]
        for name, column in columns.items():
            figure = row["figures"][name]
            cells.append(_shown(figure, column))
            if name in given:
                cells.append("-" if figure["paper"] is None else f"{figure['paper']}{column['unit']}")
        yield _line(cells)
    yield ""
    yield from (column["note"] for column in columns.values() if column["note"])
    if not given:
        yield "The paper's own figures were not available."
    if result["orders"]:
        yield ""
        yield from _table_head(["the paper's claim", "here", "difference, 95 % over images", "over seeds"])
    for order in result["orders"]:
        column = columns[order["column"]]
        claim = f"{column['heading']}: {order['higher']} > {order['lower']}"
        over = [_interval(order["over"][what], column) for what in ("images", "seeds")]
        if over == ["-", "-"]:
            over[1] = f"{column['scale'] * order['difference']:+.{column['digits']}f}, one seed"
        yield _line([claim, order["finding"], *over])


def _shown(figure: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    scale, digits = column["scale"], column["digits"]
    sd = "" if figure["spread"] is None else f" ± {scale * figure['spread']:.{digits}f}"
    return f"{scale * figure['mean']:.{digits}f}{sd}{column['unit']}"


def _interval(interval: Mapping[str, float] | None, column: Mapping[str, Any]) -> str:
    if interval is None:
        return "-"
    mean, low, high = (f"{column['scale'] * interval[key]:+.{column['digits']}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _table_head(heads: list[str]) -> Iterator[str]:
    yield _line(heads)
    yield _line(["---"] * len(heads))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(study: Study, result: Mapping[str, Any]) -> str:
    """The study's figure, an SVG file's text: a point for each row."""
    assert study.figure is not None
    across, up = (next(c for c in study.columns if c.name == name) for name in (study.figure.x, study.figure.y))
    series: dict[str, list[Point]] = {}
    for row, found in zip(study.rows, result["rows"], strict=True):
        x, y = found["figures"][across.name], found["figures"][up.name]
        point = Point(
            across.scale * x["mean"],
            up.scale * y["mean"],
            row.name.rpartition(", ")[2],
            None if y["spread"] is None else up.scale * y["spread"],
        )
        series.setdefault(" + ".join(row.teachers or ["all"]) + " teacher", []).append(point)
    return scatter(series, study.title, f"{across.heading}{across.unit}", f"{up.heading}{up.unit}")
