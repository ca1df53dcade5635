"""The end of a run: measures speed, compares the networks, writes verdict and report."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from coadvise.advice import AVERAGE, CLASS
from coadvise.config.reading import read_config
from coadvise.data.balance import unbalanced
from coadvise.data.scanned import ScannedSplit, one_line
from coadvise.data.sources import source_of
from coadvise.errors import UserError
from coadvise.evaluation.agreement import divergences
from coadvise.evaluation.attention import attention_overlaps, darkened_by_token
from coadvise.evaluation.scores import correct, load_predictions, scores
from coadvise.evaluation.speed import images_per_second
from coadvise.evaluation.verdict import (
    ONE_SEED,
    Hits,
    Interval,
    by_class_size,
    comparison,
    macro_sentence,
    sentence,
    spread,
    teacher_remark,
)
from coadvise.models.network import load_network
from coadvise.report import write_report
from coadvise.runs.network_job import has_whole_predictions
from coadvise.runs.plan import ADVISED, ALONE, START, TEACHER, Part, adaptation
from coadvise.runs.run import CONFIG, Run, trained_parts, with_resolved_source, written_pictures
from coadvise.storage import storing
from coadvise.training.metrics import last_of, read_records

TEACHERS = "teachers"  # in place of a part, where all of them answer together
ADAPTED = {"train": "", "none": " (given)", "finetune": " (fine-tuned)", "probe": " (linear probe)"}


def conclude(run: Run, parts: Sequence[Part]) -> None:
    """Measures speed (of the class head, as in deployment), compares, writes verdict and report."""
    if not run.engine.is_main:
        return
    parts = [*parts, *_finished_beside(run, parts)]
    results = {part.name: last_of(read_records(run.folder), "result", part.name) for part in parts}
    networks = {part.name: load_network(run.folder / part.name).for_inference() for part in parts}
    for network in networks.values():
        run.engine.prepare(network)
    speeds = images_per_second(networks, run.config.data.image_size, run.engine)
    predictions = {part.name: load_predictions(run.folder, part.name) for part in parts}
    advised, alone = _hits(parts, ADVISED, predictions), _hits(parts, ALONE, predictions).get(CLASS, {})
    seeds = sorted(advised[CLASS])
    compared = {answer: comparison(hits, alone) for answer, hits in advised.items() if alone}
    differences = {answer: _difference(*intervals, len(seeds)) for answer, intervals in compared.items()}
    how = {part.name: adaptation(part, run.config) for part in parts}
    rows = _rows(parts, {part: result for part, result in results.items() if result}, speeds, differences, how)
    teachers = [part for part in parts if part.role == TEACHER]
    if len(teachers) > 1:
        rows.insert(len(teachers), _average_of(teachers, predictions, results, speeds))
    text, macro = "Trained without a baseline: run again with --baseline to see whether advice helped.", None
    if alone:
        text = sentence(*compared[CLASS], len(run.dataset.scored))
    unequal = unbalanced(run.dataset.train.per_class(len(run.dataset.classes)))
    if alone and unequal:
        labels = predictions[parts[0].name][1].numpy()
        weighted = [{s: by_class_size(hit, labels) for s, hit in hits.items()} for hits in (advised[CLASS], alone)]
        macro = comparison(*weighted)
        text += " " + macro_sentence(*macro)
    right = {(part.title, part.name): correct(*predictions[part.name])[CLASS].numpy() for part in teachers}
    said = (ONE_SEED if len(seeds) == 1 and alone else None, teacher_remark(right, advised[CLASS]))
    remarks = [remark for remark in said if remark]
    logits = {part: tokens for part, (tokens, _) in predictions.items()}
    student = load_network(run.folder / next(part.name for part in parts if part.role == ADVISED))
    overlaps = attention_overlaps(student, run.dataset.scored)
    attention = partial(darkened_by_token, student, run.dataset.scored) if overlaps else None
    run.record.add(
        "verdict", images=len(run.dataset.scored), seeds=seeds, rows=rows,
        difference=differences.get(CLASS), macro_difference=_difference(*macro, len(seeds)) if macro else None,
        sentence=text, remark=" ".join(remarks) or None,
        divergences=[asdict(divergence) for divergence in divergences(logits)], overlaps=overlaps,
    )  # fmt: skip
    with storing(run.folder):
        report = write_report(run.folder, run.dataset.scored.read, attention)
    for line in verdict_table(rows, unequal):
        run.listener.say(line)
    run.listener.say(text)
    for remark in remarks:
        run.listener.say(remark)
    run.listener.say(f"report: {report}")


def _finished_beside(run: Run, parts: Sequence[Part]) -> list[Part]:
    """Students that earlier commands of the run trained and this one does not ask for: more seeds, a baseline."""
    asked = {part.name for part in parts}
    others = [name for name in trained_parts(run.folder) if name.startswith("students/") and name not in asked]
    named = (name.removeprefix("students/").rpartition("-") for name in others)
    beside = [Part(name, role, int(seed)) for name, (role, _, seed) in zip(others, named, strict=True)]
    return [part for part in beside if has_whole_predictions(run, part)]


def renew_report(folder: Path) -> Path:
    """Makes a finished run's report anew from its record, with pictures where those it was scored on are at hand."""
    config, read, attention = read_config(folder / CONFIG), None, None
    with suppress(UserError):
        source = source_of(with_resolved_source(folder, config))
        rows = {one_line(name): row for row, name in enumerate(source.scored.names())}
        listed = written_pictures(folder).get("val" if source.test is None else "test", [])
        names = [line.split(" ", 2)[2] for line in listed if not line.startswith("-")]
        advised = [part for part in trained_parts(folder) if part.startswith("students/advised-")]
        if names and advised and rows.keys() >= {*names}:
            scored = source.scored.subset([rows[name] for name in names])
            student = load_network(folder / advised[0])
            fit, values = config.data.fit, student.values
            split = ScannedSplit(scored, scored.labels, None, (), Counter(), fit=fit, values=values)
            read, attention = split.read, partial(darkened_by_token, student, split)
    with storing(folder):
        return write_report(folder, read, attention)


def verdict_table(rows: Sequence[Mapping[str, Any]], with_macro: bool = False) -> Iterator[str]:
    """The rows as aligned text. Differences are points above the student alone, with a 95 % interval over images."""
    macro = f" {'macro':>6}" if with_macro else ""
    yield f"{'':33} {'top-1':>6} {'± sd':>5} {'difference':>10}{macro} {'parameters':>10} {'images/s':>8}"
    for row in rows:
        sd = f"{100 * row['spread']:.1f}" if row["spread"] is not None else ""
        gain = row.get("difference")
        points = f"{100 * gain['mean']:+.1f} ± {100 * (gain['high'] - gain['mean']):.1f}" if gain else ""
        parameters, speed = row["parameters"] / 1e6, row["images_per_second"]
        share = row["macro_accuracy"]
        macro = "" if not with_macro else f" {100 * share:5.1f}%" if share is not None else f" {'':6}"
        yield f"{row['name']:33} {100 * row['top1']:5.1f}% {sd:>5} {points:>10}{macro} {parameters:8.2f} M {speed:8.0f}"


def _rows(
    parts: Sequence[Part],
    results: Mapping[str, Mapping[str, Any]],
    speeds: Mapping[str, float],
    differences: Mapping[str, Mapping[str, Any]],
    how: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One row a teacher, one for the student alone, one an output head of the co-advised student; means over seeds.

    Args:
        how: each network's adaptation; one that was not trained from scratch says so.
    """

    def row(
        name: str, same: Sequence[Part], answer: str, difference: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        values = [results[part.name]["top1"][answer] for part in same]
        return {
            "name": name,
            "part": same[0].name,
            "answer": answer,
            "top1": sum(values) / len(values),
            "spread": spread(values),
            "macro_accuracy": _mean_of(results, same, "macro_accuracy", answer),
            "parameters": results[same[0].name]["parameters"],
            "images_per_second": statistics.median(speeds[part.name] for part in same),
            "difference": difference,
        }

    rows = [row(part.title + ADAPTED[how[part.name]], [part], CLASS) for part in parts if part.role == TEACHER]
    rows += [row(part.title, [part], CLASS) for part in parts if part.role == START]
    if alone := [part for part in parts if part.role == ALONE]:
        rows.append(row("student alone", alone, CLASS))
    advised = [part for part in parts if part.role == ADVISED]
    for answer in results[advised[0].name]["top1"]:
        if any(answer not in results[part.name]["top1"] for part in advised):
            continue
        what = answer if answer == AVERAGE else f"{answer} token"
        rows.append(row(f"student co-advised ({what})", advised, answer, differences.get(answer)))
    return rows


def _average_of(
    teachers: Sequence[Part],
    predictions: Mapping[str, tuple[Mapping[str, Tensor], Tensor]],
    results: Mapping[str, Mapping[str, Any] | None],
    speeds: Mapping[str, float],
) -> dict[str, Any]:
    """The row of the mean of the teachers' probabilities, which costs what all teachers cost."""
    labels = predictions[teachers[0].name][1]
    found = scores({part.name: predictions[part.name][0][CLASS] for part in teachers}, labels)[AVERAGE]
    return {
        "name": "average of the teachers",
        "part": TEACHERS,
        "answer": AVERAGE,
        "top1": found.top1,
        "spread": None,
        "macro_accuracy": found.macro_accuracy,
        "parameters": sum((results[part.name] or {})["parameters"] for part in teachers),
        "images_per_second": 1 / sum(1 / speeds[part.name] for part in teachers),
        "difference": None,
    }


def _mean_of(results: Mapping[str, Mapping[str, Any]], same: Sequence[Part], figure: str, answer: str) -> float | None:
    """None for results of earlier versions, which lack the figure."""
    values = [results[part.name].get(figure, {}).get(answer) for part in same]
    return None if None in values else sum(values) / len(values)


def _difference(over_images: Interval, over_seeds: Interval | None, seeds: int) -> dict[str, Any]:
    """The gain by advice, as a share of the images, with both intervals."""
    several = {**asdict(over_seeds), "n": seeds} if over_seeds else None
    return {**asdict(over_images), "over": "images", "seeds": several}


def _hits(
    parts: Sequence[Part], role: str, predictions: Mapping[str, tuple[Mapping[str, Tensor], Tensor]]
) -> dict[str, dict[int, Hits]]:
    """Which of the scored images each output head gets right, by seed. Heads that a seed lacks are left out."""
    hits: dict[str, dict[int, Hits]] = {}
    for part in parts:
        if part.role == role:
            for answer, right in correct(*predictions[part.name]).items():
                hits.setdefault(answer, {})[part.seed] = right.numpy()
    seeds = max(map(len, hits.values()), default=0)  # after --allow-changes some may lack a head
    return {answer: by_seed for answer, by_seed in hits.items() if len(by_seed) == seeds}
