"""The end of a run: speed, comparison, verdict, report."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from coadvise.advice import AVERAGE, CLASS
from coadvise.evaluation.agreement import divergences
from coadvise.evaluation.scores import correct, load_predictions
from coadvise.evaluation.speed import images_per_second
from coadvise.evaluation.verdict import ONE_SEED, Hits, Interval, comparison, sentence, spread, teacher_remark
from coadvise.models.network import load_network
from coadvise.report import write_report
from coadvise.runs.plan import ADVISED, ALONE, TEACHER, Arm
from coadvise.runs.run import Run
from coadvise.storage import storing
from coadvise.training.metrics import last_of, read_records


def conclude(run: Run, arms: Sequence[Arm]) -> None:
    """Measures speed (of the class answer, as in use), compares, writes verdict and report."""
    if not run.engine.is_main:
        return
    results = {arm.part: last_of(read_records(run.folder), "result", arm.part) for arm in arms}
    networks = {arm.part: load_network(run.folder / arm.part).for_inference() for arm in arms}
    for network in networks.values():
        run.engine.prepare(network)
    speeds = images_per_second(networks, run.config.data.image_size, run.engine)
    predictions = {arm.part: load_predictions(run.folder, arm.part) for arm in arms}
    advised, alone = _hits(arms, ADVISED, predictions), _hits(arms, ALONE, predictions).get(CLASS, {})
    seeds = sorted(advised[CLASS])
    compared = {answer: comparison(hits, alone) for answer, hits in advised.items() if alone}
    differences = {answer: _difference(*intervals, len(seeds)) for answer, intervals in compared.items()}
    rows = _rows(arms, {part: result for part, result in results.items() if result}, speeds, differences)
    text = "Trained without a baseline: run again with --baseline to learn whether advice helped."
    if alone:
        text = sentence(*compared[CLASS], len(run.dataset.val))
    teachers = [arm for arm in arms if arm.role == TEACHER]
    right = {(arm.name, arm.part): correct(*predictions[arm.part])[CLASS].numpy() for arm in teachers}
    said = (ONE_SEED if len(seeds) == 1 and alone else None, teacher_remark(right, advised[CLASS]))
    remarks = [remark for remark in said if remark]
    logits = {part: tokens for part, (tokens, _) in predictions.items()}
    run.record.add(
        "verdict", images=len(run.dataset.val), seeds=seeds, rows=rows,
        difference=differences.get(CLASS), sentence=text, remark=" ".join(remarks) or None,
        divergences=[asdict(divergence) for divergence in divergences(logits)],
    )  # fmt: skip
    with storing(run.folder):
        report = write_report(run.folder)
    for line in verdict_table(rows):
        run.listener.say(line)
    run.listener.say(text)
    for remark in remarks:
        run.listener.say(remark)
    run.listener.say(f"report: {report}")


def verdict_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The verdict's rows as aligned text; differences are points to the student alone, with 95 % over images."""
    yield f"{'':33} {'top-1':>6} {'± sd':>5} {'difference':>10} {'parameters':>10} {'images/s':>8}"
    for row in rows:
        sd = f"{100 * row['spread']:.1f}" if row["spread"] is not None else ""
        gain = row.get("difference")
        points = f"{100 * gain['mean']:+.1f} ± {100 * (gain['high'] - gain['mean']):.1f}" if gain else ""
        parameters, speed = row["parameters"] / 1e6, row["images_per_second"]
        yield f"{row['name']:33} {100 * row['top1']:5.1f}% {sd:>5} {points:>10} {parameters:8.2f} M {speed:8.0f}"


def _rows(
    arms: Sequence[Arm],
    results: Mapping[str, Mapping[str, Any]],
    speeds: Mapping[str, float],
    differences: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One row a teacher, one for the student alone, one an answer of the co-advised student; means over seeds."""

    def row(name: str, same: Sequence[Arm], answer: str, difference: Mapping[str, Any] | None = None) -> dict[str, Any]:
        values = [results[arm.part]["top1"][answer] for arm in same]
        return {
            "name": name,
            "part": same[0].part,
            "answer": answer,
            "top1": sum(values) / len(values),
            "spread": spread(values),
            "parameters": results[same[0].part]["parameters"],
            "images_per_second": statistics.median(speeds[arm.part] for arm in same),
            "difference": difference,
        }

    rows = [row(arm.name, [arm], CLASS) for arm in arms if arm.role == TEACHER]
    if alone := [arm for arm in arms if arm.role == ALONE]:
        rows.append(row("student alone", alone, CLASS))
    advised = [arm for arm in arms if arm.role == ADVISED]
    for answer in results[advised[0].part]["top1"]:
        if any(answer not in results[arm.part]["top1"] for arm in advised):
            continue
        what = answer if answer == AVERAGE else f"{answer} token"
        rows.append(row(f"student co-advised ({what})", advised, answer, differences.get(answer)))
    return rows


def _difference(over_images: Interval, over_seeds: Interval | None, seeds: int) -> dict[str, Any]:
    """What advice changed, as shares of the images, with both intervals."""
    several = {**asdict(over_seeds), "n": seeds} if over_seeds else None
    return {**asdict(over_images), "over": "images", "seeds": several}


def _hits(
    arms: Sequence[Arm], role: str, predictions: Mapping[str, tuple[Mapping[str, Tensor], Tensor]]
) -> dict[str, dict[int, Hits]]:
    """Which validation images each answer gets right, by seed; of the answers that all seeds have."""
    hits: dict[str, dict[int, Hits]] = {}
    for arm in arms:
        if arm.role == role:
            for answer, right in correct(*predictions[arm.part]).items():
                hits.setdefault(answer, {})[arm.seed] = right.numpy()
    seeds = max(map(len, hits.values()), default=0)  # of a run that was changed on its way some may lack an answer
    return {answer: by_seed for answer, by_seed in hits.items() if len(by_seed) == seeds}
