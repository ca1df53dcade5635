"""A plan as the user reads it, and as a program does."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from coadvise.config.schema import plain_size, size_text
from coadvise.costs.bottleneck import bottleneck
from coadvise.costs.foresee import Foreseen, Plan, Question
from coadvise.costs.sizes import store_bytes
from coadvise.data.scan import MEMORY_LIMIT
from coadvise.runs.estimate import time_text
from coadvise.storage import bytes_text

_HEADS = ("time", "a step", "images", "memory", "fit", "cores", "sent")
_WIDTHS = (11, 10, 8, 10, 8, 7, 10)


def lines(plan: Plan) -> Iterator[str]:
    """The plan as text."""
    question, disk = plan.question, plan.disk
    size = size_text(question.config.data.image_size)
    precision = "bfloat16" if question.half else "float32"
    what = f"{question.images:,} images of {question.classes:,} classes at {size} pixels"
    yield f"{what} on {_where(question)}, {precision}"
    if question.target.assumed:
        yield f"  {question.target.assumed}"
    width = max([len(one.part.title) for one in plan.networks] + [8])
    yield ""
    yield " " * width + "".join(map(str.rjust, _HEADS, _WIDTHS)) + "  held up by"
    for one in plan.networks:
        *cells, held = cells_of(question, one)
        yield f"{one.part.title:{width}}" + "".join(map(str.rjust, cells, _WIDTHS)) + f"  {held}"
    several = f"{plan.jobs} networks at a time" if plan.jobs > 1 else "one network after the other"
    yield f"{'in all':{width}}{time_text(60 * plan.minutes):>11}  {several}"
    yield ""
    yield "images: of a micro-batch on one process; fit: the most of them that memory holds; cores: that make views as"
    yield "fast as they are used, on each node; sent: by a process in a step"
    cache = f"with --cache {bytes_text(disk.cache)} more"
    yield f"disk: store {bytes_text(disk.store)}, checkpoints {bytes_text(disk.checkpoints)}; {cache}"
    yield from breaks(plan)
    yield ""
    yield from (f"{', '.join(names)}: {what}" for what, names in _remedies(plan).items())


def cells_of(question: Question, one: Foreseen) -> tuple[str, ...]:
    """A network's row: time, a step, images, memory, the images that fit, cores, bytes sent, what holds it up."""
    held = bottleneck(question, one)
    return (
        time_text(60 * one.minutes), _seconds(one.seconds), f"{one.images:,}", bytes_text(one.memory),
        f"{one.largest:,}", f"{one.cores:.1f}", bytes_text(one.sent), f"{held.what}, {held.share:.0%}",
    )  # fmt: skip


def _where(question: Question) -> str:
    nodes = f"{question.nodes} nodes of " if question.nodes > 1 else ""
    return f"{nodes}{question.gpus} x {question.target.name}" if question.gpus else f"{nodes}{question.target.name}"


def breaks(plan: Plan) -> list[str]:
    """What `fit` will refuse."""
    question = plan.question
    if question.config.in_memory and store_bytes(question.config, question.images) > MEMORY_LIMIT:
        return [
            f"fit refuses it: decoded images take more than {bytes_text(MEMORY_LIMIT)}, and no more is kept in memory; "
            "augment.kind=deit decodes them as needed"
        ]
    return []


def _remedies(plan: Plan) -> dict[str, list[str]]:
    """Titles of networks by what would move them."""
    found: dict[str, list[str]] = {}
    for one in plan.networks:
        held = bottleneck(plan.question, one)
        names = found.setdefault(f"{held.what}: {held.remedy}", [])
        names.append(one.part.title)
    return found


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON holds it: seconds and bytes."""
    question = plan.question
    return {
        "images": question.images, "classes": question.classes, "pixels": plain_size(question.config.data.image_size),
        "device": question.target.name, "gpus": question.gpus, "nodes": question.nodes,
        "precision": "bfloat16" if question.half else "float32", "assumed": question.target.assumed,
        "device_memory": question.target.memory, "minutes": plan.minutes, "jobs": plan.jobs, "disk": asdict(plan.disk),
        "refused": breaks(plan),
        "networks": [
            {
                **{key: value for key, value in asdict(one).items() if key != "part"},
                "network": one.part.title, "minutes": one.minutes, "bottleneck": asdict(bottleneck(question, one)),
            }
            for one in plan.networks
        ],
    }  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
