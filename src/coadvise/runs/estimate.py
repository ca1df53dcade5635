"""How long training will take here: times some steps of each network and throws them away."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from coadvise.config.schema import RunConfig, names_model
from coadvise.data.loader import whole_batch
from coadvise.data.scanned import Dataset
from coadvise.data.views import Views
from coadvise.data.workers import seconds_with_workers
from coadvise.models.network import Network
from coadvise.models.pretrained import given_network
from coadvise.runs.network_job import initial_network, is_trained, recipe_of, trained_here
from coadvise.runs.plan import ADVISED, TEACHER, Part, RunPlan
from coadvise.training.engine import Engine
from coadvise.training.optim import average_of, make_optimiser

TIMED_IMAGES = 64  # at most so many images a timed step on a CPU, where time grows with their number
TIMED_SECONDS = 2.0  # steps are timed for so long, at least two; the first does not count


def estimate(plan: RunPlan, dataset: Dataset, engine: Engine) -> Iterator[tuple[Part, float]]:
    """Yields each network that a plan trains, and the seconds its training takes on this machine as it is now.

    0 if it is trained. Evaluation, compilation and filling a cache are not counted.
    """
    config = plan.config
    seconds: dict[tuple[str, str], float] = {}  # all seeds take the same time
    for part in plan.parts:
        if not trained_here(part, config):
            continue
        if is_trained(plan.folder, part):
            yield part, 0.0
            continue
        kind = part.role, part.teacher
        if kind not in seconds:
            seconds[kind] = _training_seconds(part, config, dataset, engine)
        yield part, seconds[kind]


def _adviser(part: Part, config: RunConfig, dataset: Dataset) -> Network:
    """A teacher as it will advise, or an untrained one of the same architecture."""
    teacher = config.teachers[part.teacher]
    if teacher.adaptation == "none" and not names_model(str(teacher.start)) and not Path(str(teacher.start)).exists():
        teacher = teacher.model_copy(update={"start": None, "adapt": None})  # a study will train it
    if not teacher.trained_here:
        return given_network(part.teacher, teacher, config.data.image_size)
    return initial_network(part, config.model_copy(update={"teachers": {part.teacher: teacher}}), dataset.classes)


def _training_seconds(part: Part, config: RunConfig, dataset: Dataset, engine: Engine) -> float:
    """Seconds a network will train: its number of steps, times the median of some timed ones."""
    recipe = recipe_of(part, config, len(dataset.train))
    augment = config.teachers[part.teacher].augment if part.role == TEACHER else None
    views = Views(dataset.train, augment or config.augment, len(dataset.classes), config.data.image_size, part.seed).on(
        engine.device
    )
    whole = whole_batch(recipe.batch_size, len(views), recipe.accumulate, engine.processes)
    images = whole // (recipe.accumulate * engine.processes)
    timed = min(images, TIMED_IMAGES) if engine.device.type == "cpu" else images
    network = initial_network(part, config, dataset.classes)
    asked = config.teachers if part.role == ADVISED and config.cache is None else ()
    advisers = [_adviser(replace(part, role=TEACHER, teacher=name), config, dataset) for name in asked]
    for module in (network, *advisers):
        engine.prepare(module)
    for adviser in advisers:
        adviser.requires_grad_(False).eval()
    optimiser = make_optimiser(network.model, recipe)
    averaged = average_of(network, recipe)
    seeing, stepping = list[float](), list[float]()
    while len(stepping) < 2 or sum(seeing + stepping) < TIMED_SECONDS:
        began = time.perf_counter()
        batch = engine.place(views[0, np.arange(timed)])
        engine.synchronise()
        seen = time.perf_counter()
        with engine.autocast():
            for adviser in advisers:
                adviser(batch.images)
            answers = network.train()(batch.images)
        engine.backward(sum(logits.float().logsumexp(-1).mean() for logits in answers.values()))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if averaged is not None:
            averaged.update(network, len(stepping))
        engine.synchronise()
        seeing.append(seen - began)
        stepping.append(time.perf_counter() - seen)
    view, step = median(seeing[1:]), median(stepping[1:])  # the first builds and allocates
    workers = config.data.workers if views.device.type == "cpu" else 0
    seconds = seconds_with_workers(view, step, workers, engine.device.type)
    return seconds * images / timed * recipe.accumulate * recipe.epochs * (len(views) // whole)
