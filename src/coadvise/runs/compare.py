"""Several finished runs beside each other: accuracies, paired differences, what advice is worth in all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coadvise.advice import CLASS
from coadvise.config.reading import differences, read_config
from coadvise.errors import UserError
from coadvise.evaluation.scores import correct, finished_predictions
from coadvise.evaluation.verdict import Interval, paired_interval, seed_interval, sentence
from coadvise.report.compare import render
from coadvise.runs.plan import ADVISED, ALONE, START, TEACHER
from coadvise.runs.run import CONFIG, DATA, check_run, written_data
from coadvise.storage import write_text
from coadvise.training.metrics import read_records

Hits = npt.NDArray[np.float64]  # [N]: the share of seeds that are right about an image


@dataclass(frozen=True)
class Opened:
    """What a comparison needs of a run.

    Attributes:
        hits: of each network or kind of student, the class token's.
        data: where the pictures are.
        names, labels: of the scored pictures.
    """

    folder: Path
    hits: Mapping[str, Hits]
    data: str
    names: tuple[str, ...]
    labels: npt.NDArray[np.int64]

    def same_pictures(self, other: "Opened") -> bool:
        return (self.data, self.names) == (other.data, other.names) and np.array_equal(self.labels, other.labels)


def compare(runs: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Compares finished runs; the first is the one that others are compared with. Trains nothing.

    Args:
        runs: two or more run directories, of any data.
        out: a page to write.

    Returns:
        In "runs" a row each with its accuracies (shares), and for all but the first "differences", by network the
        difference to the first run's, paired over images, or None where the scored pictures are not the same, and
        "changes", what differs in the configuration. In "pooled" advice over all runs that have a baseline, and in
        "lead" the co-advised students against their most accurate teacher, over all runs.

    Raises:
        UserError: fewer than two runs, one that is not finished, or a page that cannot be written.
    """
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise UserError("give two or more run directories to compare")
    if twice := [folder for n, folder in enumerate(folders) if folder.resolve() in map(Path.resolve, folders[:n])]:
        raise UserError(f"'{twice[0]}' is given twice; give each run once")
    if out is not None and Path(out).suffix != ".html":
        raise UserError(f"'{out}' must end in .html")
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise UserError(f"'{Path(out).parent}' is not a folder; create it, or choose another path")
    opened = [_opened(folder) for folder in folders]
    first, config = opened[0], read_config(folders[0] / CONFIG)
    rows = []
    for run in opened:
        same = run is first or run.same_pictures(first)
        row: dict[str, Any] = {
            "run": str(run.folder),
            "images": len(run.labels),
            "top1": {name: float(hits.mean()) for name, hits in run.hits.items()},
        }
        if run is not first:
            shared = [name for name in run.hits if name in first.hits]
            row["same_pictures"] = same
            row["differences"] = {
                name: asdict(paired_interval([run.hits[name]], [first.hits[name]])) if same else None for name in shared
            }
            row["changes"] = differences(config, read_config(run.folder / CONFIG))
        rows.append(row)
    result = {"runs": rows, "pooled": _advice(opened), "lead": _lead(opened)}
    if out is not None:
        write_text(Path(out), render(result, folders))
    return result


def _opened(folder: Path) -> Opened:
    check_run(folder)
    data = written_data(folder)
    by_kind: dict[str, list[Hits]] = {}
    labels: npt.NDArray[np.int64] | None = None
    roles = {record["part"]: record["role"] for record in read_records(folder) if record["kind"] == "result"}
    kinds = (TEACHER, ADVISED, ALONE, START)  # in which order they are shown; the record's is that of their training
    for part, role in sorted(roles.items(), key=lambda item: kinds.index(item[1])):
        logits, found = finished_predictions(folder, part)
        hits = correct(logits, found)[CLASS].numpy().astype(float)
        of_kind = by_kind.setdefault(part if role == TEACHER else role, [])
        of_kind.append(hits)
        labels = found.numpy()
    splits = data.get("splits", {})
    names = tuple((splits.get("test") or splits.get("val") or {}).get("paths", ()))
    if labels is not None and len(names) != len(labels):
        raise UserError(f"'{folder / DATA}' does not name the pictures that '{folder}' was scored on; restore it")
    if labels is None or ADVISED not in by_kind:
        raise UserError(f"'{folder}' has no finished co-advised student yet; run the same 'coadvise fit' again")
    means = {name: np.mean(hits, axis=0) for name, hits in by_kind.items()}
    return Opened(folder, means, str(data.get("folder", "")), names, labels)


def _advice(runs: Sequence[Opened]) -> dict[str, Any] | None:
    """What advice is worth over all runs with a baseline."""
    with_baseline = _different([run for run in runs if ALONE in run.hits])
    if len(with_baseline) < 2:
        return None
    over_images, over_runs, images = _pooled(with_baseline, ALONE)
    return {
        **_about(over_images, over_runs, images, len(with_baseline)),
        "sentence": sentence(over_images, over_runs, images, "runs"),
        "top1": {name: _mean(with_baseline, name) for name in _in_all(with_baseline)},
    }


def _lead(runs: Sequence[Opened]) -> dict[str, Any] | None:
    """How far the co-advised student is ahead of its most accurate teacher, over all runs."""
    runs = _different(runs)
    teachers = [name for name in _in_all(runs) if name not in (ADVISED, ALONE, START)]
    if len(runs) < 2 or not teachers:
        return None
    best = max(teachers, key=lambda name: _mean(runs, name))
    over_images, over_runs, images = _pooled(runs, best)
    said = f"over {images} test images" + (f", {over_runs} over runs" if over_runs else "")
    return {
        "teacher": best, **_about(over_images, over_runs, images, len(runs)),
        "sentence": f"The co-advised student minus the {_title(best)} teacher: {over_images} {said}.",
    }  # fmt: skip


def _different(runs: Sequence[Opened]) -> list[Opened]:
    """Without runs whose co-advised students are another run's, by a copy or --reuse: they count once."""
    firsts = {(run.data, run.names, run.hits[ADVISED].tobytes()): id(run) for run in reversed(runs)}
    return [run for run in runs if id(run) in firsts.values()]


def _pooled(runs: Sequence[Opened], other: str) -> tuple[Interval, Interval | None, int]:
    """The co-advised students minus another network, over images and over runs, and the number of images.

    The differences of a picture that several runs score are averaged first, since two observations of one picture are
    not independent.
    """
    gains: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for name, gain in zip(run.names, run.hits[ADVISED] - run.hits[other], strict=True):
            gains.setdefault((run.data, name), []).append(float(gain))
    means = np.array([np.mean(values) for values in gains.values()])
    over_runs = seed_interval([float((run.hits[ADVISED] - run.hits[other]).mean()) for run in runs])
    return paired_interval([means], [np.zeros_like(means)]), over_runs, len(means)


def _about(over_images: Interval, over_runs: Interval | None, images: int, runs: int) -> dict[str, Any]:
    return {
        "runs": runs, "images": images, "over_images": asdict(over_images),
        "over_runs": asdict(over_runs) if over_runs else None,
    }  # fmt: skip


def _in_all(runs: Sequence[Opened]) -> list[str]:
    return [name for name in runs[0].hits if all(name in run.hits for run in runs)]


def _mean(runs: Sequence[Opened], name: str) -> float:
    return float(np.mean([run.hits[name].mean() for run in runs]))


def _title(name: str) -> str:
    return name.removeprefix("teachers/")


def comparison_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The comparison as aligned text."""
    rows = result["runs"]
    names = list(dict.fromkeys(name for row in rows for name in row["top1"]))
    width = max(len(row["run"]) for row in rows)
    yield f"{'':{width}} {'images':>6} " + " ".join(f"{_title(name):>16}" for name in names)
    for row in rows:
        cells = [f"{100 * row['top1'][name]:.1f}%" if name in row["top1"] else "-" for name in names]
        yield f"{row['run']:{width}} {row['images']:6} " + " ".join(f"{cell:>16}" for cell in cells)
        if (found := row.get("differences")) and any(found.values()):
            cells = [_points(found.get(name)) for name in names]
            yield f"{'  minus the first':{width}} {'':6} " + " ".join(f"{cell:>16}" for cell in cells)
        elif found is not None:
            yield "  scored on other pictures than the first, so not compared with it image by image"
        for change in row.get("changes", ()):
            yield f"  {change}"
    if pooled := result["pooled"]:
        tops = ((_title(name), 100 * top1) for name, top1 in pooled["top1"].items())
        means = ", ".join(f"{name} {top1:.1f}%" for name, top1 in tops)
        yield f"all {pooled['runs']} runs with a baseline together: {means}"
        yield pooled["sentence"]
    if lead := result["lead"]:
        yield lead["sentence"]


def _points(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{100 * found['mean']:+.1f} ± {100 * (found['high'] - found['mean']):.1f}"
