"""The result of a study: every column of every row beside the paper's figures, its claims judged, a table, a figure."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from coadvise.evaluation.verdict import Interval, direction, paired_interval, seed_interval, spread
from coadvise.report.scatter import Point, scatter
from coadvise.runs.run import made_here
from coadvise.studies import Claim, Study
from coadvise.studies.columns import GAIN, Column
from coadvise.studies.measures import Finished, Value, measure
from coadvise.studies.question import SIMILAR, Weights
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.metrics import last_of, read_records

HELD, NOT_HELD, NOISE, NOT_JUDGED = "held", "not held", "within noise", "not judged"
NOT_MEASURED = "not measured"
Values = Mapping[str, Mapping[int, Value]]  # of a column, by row and seed


def measured(study: Study, finished: Mapping[str, Finished], engine: Engine, listener: Listener) -> dict[str, Any]:
    """Measures all columns.

    Args:
        finished: the trained networks by row.

    Returns:
        What `NAME.json` holds, besides its name, data and networks: {"title", "paper_data", "columns": [{"name",
        "heading", "scale", "digits", "unit", "note"}], "rows": [{"name", "beyond", "run", "figures": {column: {"seeds":
        {seed: figure}, "mean", "spread", "paper", "printed"}}}], "claims": [{"text", "section", "column", "kind",
        "rows": {row: weight}, "finding", "difference", "over": {"images", "seeds"}, "paper"}], "notes"}, its origin,
        and the commands that trained the networks. Figures are as measured (shares, counts), the paper's as printed
        there. What was not measured is None.
    """
    values: dict[str, Values] = {
        column.name: dict(zip(finished, measure(column, list(finished.values()), engine, listener), strict=True))
        for column in study.columns
    }
    rows = [
        {
            "name": row.name,
            "beyond": row.beyond,
            "run": str(finished[row.name].run) if finished[row.name].parts else None,
            "figures": {
                name: {
                    **_summary(of_rows[row.name]),
                    "paper": row.paper.get(name),
                    "printed": study.as_printed(name, row.paper.get(name)),
                }
                for name, of_rows in values.items()
            },
        }
        for row in study.rows
    ]
    claims = [judged(claim, study, values) for claim in study.claims]
    runs = {row.run for row in finished.values() if row.parts}
    made_by = made_here(engine)
    commands = {(last_of(read_records(run), "run") or {}).get("command") for run in runs}
    return {
        "title": study.title,
        "paper_data": study.paper_data,
        "columns": [_described(column) for column in study.columns],
        "rows": rows,
        "claims": claims,
        "notes": list(study.notes),
        **{key: made_by[key] for key in ("time", "version", "versions", "device", "command")},
        "trained_by": sorted(filter(None, commands)),
    }


def _described(column: Column) -> dict[str, Any]:
    return {key: getattr(column, key) for key in ("name", "heading", "scale", "digits", "unit", "note")}


def _summary(by_seed: Mapping[int, Value]) -> dict[str, Any]:
    means = {str(seed): float(np.mean(value)) for seed, value in by_seed.items()}
    mean = sum(means.values()) / len(means) if means else None
    return {"seeds": means, "mean": mean, "spread": spread(list(means.values()))}


def judged(claim: Claim, study: Study, values: Mapping[str, Values]) -> dict[str, Any]:
    """Judges a claim by the seeds that all of its rows have; not judged if one of them was not measured.

    Above: held, or not, only if no interval contains zero. Similar: held if all intervals are within `SIMILAR` of
    zero, not held if all are beyond it. Differ: held if no interval contains zero, not held if all are that near to it.
    """
    column = next(column for column in study.columns if column.name == claim.column)
    weights = _weights(claim, {name: _means(of_rows) for name, of_rows in values.items()})
    paper = {name: {row.name: row.paper[name] for row in study.rows if name in row.paper} for name in values}
    scales = {column.name: column.scale for column in study.columns}
    as_shares = {name: {row: value / scales[name] for row, value in of_rows.items()} for name, of_rows in paper.items()}
    of_paper = _weights(claim, as_shares)
    told = of_paper and all(row in paper[claim.column] for row in of_paper)
    by_row = values[claim.column]
    seeds = sorted(set.intersection(*(set(by_row[row]) for row in weights))) if weights else []
    found: dict[str, Any] = {"finding": NOT_JUDGED, "difference": None, "over": {"images": None, "seeds": None}}
    if seeds:
        found = _compared(claim.kind, column.exact, weights, by_row, seeds)
    return {
        "text": claim.text,
        "section": claim.section,
        "column": claim.column,
        "kind": claim.kind,
        "rows": dict(weights),
        **found,
        "paper": sum(weight * paper[claim.column][row] for row, weight in of_paper.items()) if told else None,
    }


def _weights(claim: Claim, means: Mapping[str, Mapping[str, float]]) -> Weights:
    """Empty if what the rows are chosen by is not known."""
    try:
        return claim.weights(means)
    except KeyError:
        return {}


def _means(of_rows: Values) -> dict[str, float]:
    return {row: float(np.mean([np.mean(value) for value in own.values()])) for row, own in of_rows.items() if own}


def _compared(kind: str, exact: bool, weights: Weights, by_row: Values, seeds: list[int]) -> dict[str, Any]:
    sums = [[_weighted(weights, by_row, seed, sign) for seed in seeds] for sign in (1, -1)]
    differences = [float(np.mean(higher) - np.mean(lower)) for higher, lower in zip(*sums, strict=True)]
    by_image = [[value for value in side if isinstance(value, np.ndarray)] for side in sums]
    over: dict[str, Interval | None] = {
        "images": paired_interval(*by_image) if all(by_image) else None,
        "seeds": seed_interval(differences),
    }
    difference = sum(differences) / len(differences)
    intervals = [interval for interval in over.values() if interval]
    if exact:
        intervals = [Interval(difference, difference, difference)]
    return {
        "finding": _finding(kind, intervals),
        "difference": difference,
        "over": {name: asdict(interval) if interval else None for name, interval in over.items()},
    }


def _weighted(weights: Weights, by_row: Values, seed: int, sign: int) -> Value:
    """The rows that count to one side, weighted."""
    return sum((abs(weight) * by_row[row][seed] for row, weight in weights.items() if weight * sign > 0), start=0.0)


def _finding(kind: str, intervals: list[Interval]) -> str:
    if not intervals:  # single figures of one seed
        return NOT_JUDGED
    away = direction(intervals)
    if kind == "above":
        return {1: HELD, -1: NOT_HELD, 0: NOISE}[away]
    near = all(interval.low > -SIMILAR and interval.high < SIMILAR for interval in intervals)
    far = all(interval.low > SIMILAR or interval.high < -SIMILAR for interval in intervals)
    if kind == "similar":
        return HELD if near else NOT_HELD if far else NOISE
    return HELD if away else NOT_HELD if near else NOISE


def markdown(result: Mapping[str, Any]) -> Iterator[str]:
    """The table, its notes and the claims, line by line."""
    columns = {column["name"]: column for column in result["columns"]}
    given = {name for row in result["rows"] for name, figure in row["figures"].items() if figure["paper"] is not None}
    here, there = result["data"], result["paper_data"]
    heads = ["row"]
    for name, column in columns.items():
        heads += [column["heading"], f"paper ({there})"] if name in given else [column["heading"]]
    yield f"# {result['title']}"
    yield ""
    counts = {len(figure["seeds"]) for row in result["rows"] for figure in row["figures"].values()} - {0}
    seeds, up_to = max(counts, default=0), "up to " * (len(counts) > 1)
    measured_on = f"Measured on {here}, {up_to}{seeds} seed{'s' * (seeds != 1)} a row"
    yield measured_on + (f"; the paper's figures are of {there}." if given else ".")
    if result["networks"]:
        yield "In place of the paper's networks: " + "; ".join(f"{k}: {v}" for k, v in result["networks"].items()) + "."
    yield ""
    yield from _table_head(heads)
    beyond = False
    for row in result["rows"]:
        if row["beyond"] and not beyond:
            yield _line(["*beyond the paper:*", *[""] * (len(heads) - 1)])
        beyond = row["beyond"]
        cells = [row["name"]]
        for name, column in columns.items():
            figure = row["figures"][name]
            cells.append(_shown(figure, column))
            if name in given:
                cells.append(f"{figure['printed']}{column['unit']}" if figure["printed"] else "")
        yield _line(cells)
    if notes := [*(column["note"] for column in columns.values() if column["note"]), *result["notes"]]:
        yield ""
        yield from notes
    if result["claims"]:
        of_whom = "the paper's claim" if any(claim["section"] for claim in result["claims"]) else "what is judged"
        yield ""
        yield from _table_head(
            [of_whom, "section", "column", "here", "difference, 95 % over images", "over seeds", "paper"]
        )
    for claim in result["claims"]:
        column = columns[claim["column"]]
        over = [_interval(claim["over"][what], column) for what in ("images", "seeds")]
        if over == ["-", "-"] and claim["difference"] is not None:
            over[1] = _signed(claim["difference"] * column["scale"], column)
        paper = "" if claim["paper"] is None else _signed(claim["paper"], column)
        yield _line([claim["text"], claim["section"], column["heading"], claim["finding"], *over, paper])
    if any(claim["kind"] != "above" for claim in result["claims"]):
        yield ""
        yield f"Similar: within {100 * SIMILAR:g} points."


def _shown(figure: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return NOT_MEASURED
    scale, digits = column["scale"], column["digits"]
    sd = "" if figure["spread"] is None else f" ± {scale * figure['spread']:.{digits}f}"
    return f"{scale * figure['mean']:.{digits}f}{sd}{column['unit']}"


def _signed(value: float, column: Mapping[str, Any]) -> str:
    return f"{value:+.{column['digits']}f}"


def _interval(interval: Mapping[str, float] | None, column: Mapping[str, Any]) -> str:
    if interval is None:
        return "-"
    mean, low, high = (_signed(column["scale"] * interval[key], column) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _table_head(heads: list[str]) -> Iterator[str]:
    yield _line(heads)
    yield _line(["---"] * len(heads))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(study: Study, result: Mapping[str, Any]) -> str:
    """The study's figure, an SVG file's text: a point for each row that has both figures.

    A bar is the interval of a claim about the row where gains are shown, else the standard deviation over seeds.
    """
    assert study.figure is not None
    across, up = (next(c for c in study.columns if c.name == name) for name in (study.figure.x, study.figure.y))
    series: dict[str, list[Point]] = {}
    for row in result["rows"]:
        x, y = row["figures"][across.name], row["figures"][up.name]
        if x["mean"] is None or y["mean"] is None:  # not trained yet
            continue
        kind, label = study.figure.point(row["name"])
        reach = _half_interval(result, row["name"]) if up is GAIN else y["spread"]
        spread = None if reach is None else up.scale * reach
        series.setdefault(kind, []).append(Point(across.scale * x["mean"], up.scale * y["mean"], label, spread))
    bars = ", with its 95 % interval" if up is GAIN else ""
    return scatter(series, study.title, f"{across.heading}{across.unit}", f"{up.heading}{up.unit}{bars}")


def _half_interval(result: Mapping[str, Any], row: str) -> float | None:
    """Of the claim that a row is above another: over seeds if there are several, else over images."""
    claims = [claim for claim in result["claims"] if claim["rows"].get(row) == 1]
    over = [claim["over"]["seeds"] or claim["over"]["images"] for claim in claims]
    return next(((interval["high"] - interval["low"]) / 2 for interval in over if interval is not None), None)
