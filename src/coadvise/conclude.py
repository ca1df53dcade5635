"""The end of a run: speed, comparison, verdict, report."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coadvise.agreement import divergences
from coadvise.checkpoint import storing
from coadvise.evaluate import AVERAGE, correct, load_predictions
from coadvise.loss import CLASS
from coadvise.networks import load_network
from coadvise.record import last_of, read_records
from coadvise.report import write_report
from coadvise.run import ADVISED, ALONE, TEACHER, Arm, Run
from coadvise.speed import images_per_second
from coadvise.verdict import Hits, comparison, sentence, spread


def conclude(run: Run, arms: Sequence[Arm]) -> None:
    """Measures speed (of the class answer, as in use), compares, writes verdict and report."""
    if not run.engine.is_main:
        return
    results = {arm.part: last_of(read_records(run.folder), "result", arm.part) for arm in arms}
    networks = {arm.part: load_network(run.folder / arm.part).for_inference() for arm in arms}
    for network in networks.values():
        run.engine.prepare(network)
    speeds = images_per_second(networks, run.config.data.image_size, run.engine)
    rows = _rows(arms, {part: result for part, result in results.items() if result}, speeds)
    advised, alone = _class_hits(run.folder, arms, ADVISED), _class_hits(run.folder, arms, ALONE)
    difference, text = None, "Trained without a baseline: run again with --baseline to learn whether advice helped."
    if alone:
        over_images, over_seeds = comparison(advised, alone)
        text = sentence(over_images, over_seeds, len(run.dataset.val))
        difference = {**asdict(over_images), "over": "images", "seeds": None}
        if over_seeds:
            difference["seeds"] = {**asdict(over_seeds), "n": len(alone)}
    seeds = sorted(advised)
    logits = {arm.part: load_predictions(run.folder, arm.part)[0] for arm in arms}
    run.record.add(
        "verdict", images=len(run.dataset.val), seeds=seeds, rows=rows, difference=difference, sentence=text,
        divergences=[asdict(divergence) for divergence in divergences(logits)],
    )  # fmt: skip
    with storing(run.folder):
        report = write_report(run.folder)
    for line in verdict_table(rows):
        run.listener.say(line)
    run.listener.say(text)
    run.listener.say(f"report: {report}")


def verdict_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The verdict's rows as aligned text."""
    yield f"{'':34} {'top-1':>8} {'± sd':>6} {'parameters':>11} {'images/s':>9}"
    for row in rows:
        sd = f"{100 * row['spread']:.1f}" if row["spread"] is not None else ""
        parameters, speed = row["parameters"] / 1e6, row["images_per_second"]
        yield f"{row['name']:34} {100 * row['top1']:7.1f}% {sd:>6} {parameters:9.2f} M {speed:9.0f}"


def _rows(
    arms: Sequence[Arm], results: Mapping[str, Mapping[str, Any]], speeds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a teacher, one for the student alone, one an answer of the co-advised student; means over seeds."""

    def row(name: str, same: Sequence[Arm], answer: str) -> dict[str, Any]:
        values = [results[arm.part]["top1"][answer] for arm in same]
        return {
            "name": name,
            "part": same[0].part,
            "answer": answer,
            "top1": sum(values) / len(values),
            "spread": spread(values),
            "parameters": results[same[0].part]["parameters"],
            "images_per_second": statistics.median(speeds[arm.part] for arm in same),
        }

    rows = [row(arm.name, [arm], CLASS) for arm in arms if arm.role == TEACHER]
    if alone := [arm for arm in arms if arm.role == ALONE]:
        rows.append(row("student alone", alone, CLASS))
    advised = [arm for arm in arms if arm.role == ADVISED]
    for answer in results[advised[0].part]["top1"]:
        what = answer if answer == AVERAGE else f"{answer} token"
        rows.append(row(f"student co-advised ({what})", advised, answer))
    return rows


def _class_hits(folder: Path, arms: Sequence[Arm], role: str) -> dict[int, Hits]:
    """Which validation images the class token answers rightly, by seed."""
    hits = {}
    for arm in arms:
        if arm.role == role:
            logits, labels = load_predictions(folder, arm.part)
            hits[arm.seed] = correct({CLASS: logits[CLASS]}, labels)[CLASS].numpy()
    return hits
