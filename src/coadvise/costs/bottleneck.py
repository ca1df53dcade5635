"""What holds a training up, and what moves that."""

import math
from dataclasses import dataclass

from coadvise.costs.count import NORM, OTHER, UPDATE
from coadvise.costs.foresee import Foreseen, Question

MEMORY, LOADER, NETWORK, ISSUING, TRAFFIC, ARITHMETIC = (
    "memory", "loader", "network", "issuing operations", "memory traffic", "arithmetic"
)  # fmt: skip
_TRAFFIC = (NORM, UPDATE, OTHER)
NOTABLE = 0.3  # share of a step that the teachers take, from which a cache is worth naming


@dataclass(frozen=True)
class Bottleneck:
    """What most of a step waits for, how much of the step that is, and what would make it less."""

    what: str
    share: float
    remedy: str


def bottleneck(question: Question, one: Foreseen) -> Bottleneck:
    """Of one network. A batch that does not fit into memory comes before all that takes time."""
    target, config = question.target, question.config
    if one.memory > target.memory:
        share = one.memory / target.memory
        if not one.largest:
            return Bottleneck(MEMORY, share, "not one image fits: a smaller network, or fewer pixels")
        parts = math.ceil(one.images / one.largest)
        return Bottleneck(MEMORY, share, f"it does not fit: recipe.accumulate={_accumulate(one, question, parts)}")
    computing = sum(one.computing.values())
    traffic = sum(seconds for kind, seconds in one.computing.items() if kind in _TRAFFIC)
    loading = one.making / max(1, config.data.workers)
    parts_of_it = {
        LOADER: loading if not target.gpu or loading > one.seconds - 1e-12 else 0.0,
        NETWORK: one.waiting,
        ISSUING: one.issuing if not target.gpu or one.issuing > computing else 0.0,
        TRAFFIC: traffic,
        ARITHMETIC: computing - traffic,
    }
    if target.gpu and parts_of_it[LOADER]:
        what = LOADER
    elif target.gpu and parts_of_it[ISSUING]:
        what = max((ISSUING, NETWORK), key=parts_of_it.__getitem__)
    else:
        what = max(parts_of_it, key=parts_of_it.__getitem__)
    return Bottleneck(what, min(1.0, parts_of_it[what] / one.seconds), _remedy(what, question, one))


def _accumulate(one: Foreseen, question: Question, parts: int) -> int:
    """Micro-batches a step that fit: the least number, from what is needed, that divides the batch of a process."""
    whole = one.batch // question.processes
    return next(
        number
        for number in range(one.batch // (one.images * question.processes) * parts, whole + 1)
        if whole % number == 0
    )


def _remedy(what: str, question: Question, one: Foreseen) -> str:
    config = question.config
    if one.teachers > NOTABLE and what in (ISSUING, TRAFFIC, ARITHMETIC):
        return f"teachers take {one.teachers:.0%} of it: --cache with augment.recycle asks them less often"
    if what == LOADER:
        presize = (
            "data.presize=288 (decodes pictures once), " if not config.in_memory and not config.data.presize else ""
        )
        cores = math.ceil(one.cores / max(1, question.gpus))
        return f"{presize}data.workers={cores} on as many free cores" if question.target.gpu else f"{presize}more cores"
    if what == NETWORK:
        return "a larger batch or recipe.accumulate (fewer exchanges an epoch), a faster network (--network)"
    if what == ISSUING:
        return "engine.compile=true, or a larger batch: the processor issues operations slower than they are computed"
    if what == TRAFFIC:
        return "engine.compile=true joins operations that each read and write all; memory of more bandwidth"
    if not question.half and question.target.has_half():
        return "engine.precision=bfloat16"
    return "more GPUs, or fewer pixels or epochs" if question.target.gpu else "a GPU, or fewer pixels or epochs"
