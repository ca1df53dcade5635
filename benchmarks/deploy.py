"""Accuracy over speed in ONNX Runtime on a CPU: students, the distilled DeiTs, ResNet-26 and the students' teachers.

    python -m benchmarks.deploy                       # the paper's networks at 224 pixels, with published accuracies
    python -m benchmarks.deploy RUN --out FOLDER      # a run's own networks, with the accuracies of its record

Every network is written by the export of `coadvise export` and called in turns with the others on the same batch;
figures are medians. The paper's networks have random weights here, which changes no time; their accuracies are
those of the paper's Table 3, and timm's for ResNet-26. A run's first student is also quantised (`--int8`) and scored.
FOLDER gets NAME.json, NAME.md and NAME.svg.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from torch import nn

import coadvise.models  # noqa: F401  (registers the networks with timm)
from benchmarks.table import Setting, machine
from coadvise.advice import CLASS
from coadvise.config.schema import sides
from coadvise.data.sources import short_name
from coadvise.deploy.onnx_file import Call, in_onnx_runtime, to_bytes, to_onnx
from coadvise.deploy.predict import load_from_run
from coadvise.deploy.quantise import in_int8
from coadvise.evaluation.speed import interleaved
from coadvise.models.tokens import TokenModel
from coadvise.report.scatter import Point, scatter
from coadvise.runs.plan import TEACHER, Part
from coadvise.runs.run import trained_parts, written_data
from coadvise.studies import STUDIES
from coadvise.studies.networks import PAPER_MODELS
from coadvise.training.metrics import last_of, read_records

SIZE, BATCH = 224, 8
STUDENTS, PEERS, TEACHERS = "students", "peers", "teachers"
PAPER = {  # rows of Table 3, by series
    STUDENTS: ("CiT-Ti", "CiT-S", "CiT-SAK"),
    PEERS: ("DeiT-Ti-KD", "DeiT-S-KD"),
    TEACHERS: ("RegNetY-4.0GF", "RedNet-26"),
}
RESNET26 = ("ResNet-26", "resnet26", 75.3)  # timm's published top-1 of resnet26.bt_in1k
SHORT = {"RegNetY-4.0GF": "RegNetY-4GF"}  # in `PAPER_MODELS`


@dataclass(frozen=True)
class Measured:
    """A point of the picture: top-1 in percent, images a second."""

    series: str
    name: str
    top1: float
    images_per_second: float


def imagenet(repeats: int) -> list[Measured]:
    """The paper's networks, without weights."""
    top1 = {row.name: row.paper["top1"] for row in STUDIES["table3"].rows if "top1" in row.paper}
    wanted = [
        (series, name, PAPER_MODELS[SHORT.get(name, name)], top1[name]) for series in PAPER for name in PAPER[series]
    ]
    wanted.append((PEERS, *RESNET26))
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    calls = {name: _session(timm.create_model(model).eval(), images) for _, name, model, _ in wanted}
    speed = _speed(calls, images, repeats)
    return [Measured(series, name, accuracy, speed[name]) for series, name, _, accuracy in wanted]


def of_run(run: Path, repeats: int) -> list[Measured]:
    """The networks of a finished run, one seed of each kind of student, and the first student in int8."""
    calls: dict[str, Call] = {}
    about: dict[str, tuple[str, float]] = {}
    records = read_records(run)
    parts = [part for part in trained_parts(run) if not part.startswith("students/start-")]
    firsts = {part.rpartition("-")[0] if part.startswith("students/") else part: part for part in reversed(parts)}
    images = torch.rand(BATCH, 3, *sides(load_from_run(run).image_size))
    for part in reversed(firsts.values()):
        network = load_from_run(run, part)
        result = last_of(records, "result", part)
        assert result is not None
        name, series = _title(part)
        model = to_onnx(network.answering(), images)
        calls[name] = in_onnx_runtime(to_bytes(model))
        about[name] = series, 100 * result["top1"][CLASS]
        if part.startswith("students/advised"):
            _, calls[f"{name}, int8"], found = in_int8(run, network, model, calls[name], allow_loss=True)
            about[f"{name}, int8"] = series, 100 * found["top1"]
    speed = _speed(calls, images, repeats)
    return [Measured(series, name, top1, speed[name]) for name, (series, top1) in about.items()]


def _title(part: str) -> tuple[str, str]:
    if part.startswith("teachers/"):
        return Part(part, TEACHER, 0, part.removeprefix("teachers/")).title, TEACHERS
    return "co-advised student" if part.startswith("students/advised") else "student alone", STUDENTS


def _session(model: nn.Module, images: torch.Tensor) -> Call:
    network = model.for_inference() if isinstance(model, TokenModel) else model
    return in_onnx_runtime(to_bytes(to_onnx(network, images[:2])))


def _speed(calls: Mapping[str, Call], images: torch.Tensor, repeats: int) -> dict[str, float]:
    values = images.numpy()
    bound: dict[str, Callable[[], object]] = {name: partial(call, values) for name, call in calls.items()}
    seconds = interleaved(bound, repeats, lambda: None)
    return {name: round(BATCH / time, 1) for name, time in seconds.items()}


def document(title: str, found: Sequence[Measured], about: Mapping[str, Any]) -> str:
    """NAME.md."""
    lines = [f"# {title}", "", "| network | top-1 | images/s |", "| --- | --- | --- |"]
    lines += [f"| {point.name} | {point.top1:.1f} % | {point.images_per_second:g} |" for point in found]
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    return "\n".join([*lines, "", f"Made by `python -m benchmarks.deploy`; {said}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deploy", description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="a finished run; without it the paper's networks")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each network")
    parser.add_argument("--out", type=Path, default=Path("results/deploy"))
    given = parser.parse_args()
    if given.run is None:
        name, pixels, found = "imagenet", str(SIZE), imagenet(given.repeats)
        title = "Published top-1 on ImageNet over speed in ONNX Runtime"
    else:
        found, name = of_run(given.run, given.repeats), given.run.resolve().name
        pixels = "x".join(map(str, sides(load_from_run(given.run).image_size)))
        data = short_name(str(written_data(given.run).get("root", name)))
        title = f"Top-1 on {data} over speed in ONNX Runtime"
    setting = {**machine(Setting(torch.device("cpu"))), "onnxruntime": onnxruntime.__version__}
    about = {**setting, "batch": BATCH, "pixels": pixels}
    series: dict[str, list[Point]] = {}
    for point in found:
        series.setdefault(point.series, []).append(Point(point.images_per_second, point.top1, point.name))
    given.out.mkdir(parents=True, exist_ok=True)
    text = document(title, found, about)
    picture = scatter(series, title, "images/s, ONNX Runtime on a CPU", "top-1, %", joined=False, least=1)
    (given.out / f"{name}.svg").write_text(picture)
    (given.out / f"{name}.md").write_text(text)
    (given.out / f"{name}.json").write_text(
        json.dumps({"title": title, "about": about, "networks": [asdict(point) for point in found]}, indent=1) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
