"""How long training will take here: times some steps of each network on few images, and throws them away."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from coadvise.config.schema import RunConfig, names_model, sides
from coadvise.data.loader import whole_batch
from coadvise.data.scanned import Dataset
from coadvise.data.views import Views
from coadvise.data.workers import seconds_with_workers
from coadvise.models.network import Network
from coadvise.models.pretrained import given_network
from coadvise.runs.network_job import augment_of, initial_network, is_trained, recipe_of
from coadvise.runs.plan import ADVISED, TEACHER, Part, RunPlan, adaptation, faster_preset
from coadvise.runs.schedule import duration, phases, threads_of
from coadvise.training import probe
from coadvise.training.engine import Engine
from coadvise.training.optim import average_of, make_optimiser

# On a CPU, where time grows with the number of images, a step of a large network is timed on few of them.
FIRST_IMAGES, GROWTH, TIMED_IMAGES = 2, 4, 64  # of the first step, from one step to a larger one, at most
STEP_SECONDS = 0.8  # that a timed step may take
TIMED_SECONDS = 1.0  # for so long, and at least twice, steps are timed; the first does not count
LONG = 6 * 3600  # seconds; what takes longer deserves a warning
FREE = 0.75  # of a core, on average; what times steps with less is kept waiting by other programs
WORTH_TIMING = 2e8  # pixels of all training views; what has fewer is trained in a few minutes


@dataclass(frozen=True)
class Forecast:
    """How long a run or a study will take.

    Attributes:
        seconds: until all is trained.
        jobs: networks that are trained at the same time, at most.
        share: of a core, that timing the steps had on average.
    """

    seconds: float
    jobs: int
    share: float = 1.0

    def text(self) -> str:
        """As the user reads it."""
        several = f", {self.jobs} networks at a time" if self.jobs > 1 else ", one network after the other"
        busy = "; longer while other programs keep it busy, as now" if self.share < FREE else ""
        return f"{time_text(self.seconds)} on this machine{several}{busy}"

    def warning(self, preset: str) -> str | None:
        """What to do about a very long run; None if it is not."""
        if self.seconds <= LONG:
            return None
        instead = faster_preset(preset)
        how = f"--preset {instead} is made for less" if instead else "fewer epochs (student.recipe.epochs) take less"
        return f"this will take {time_text(self.seconds)} here; {how}"


def time_text(seconds: float) -> str:
    """Minutes, or hours where there are many."""
    return f"{seconds / 60:.1f} min" if seconds < LONG else f"{seconds / 3600:,.0f} hours"


def forecast(
    plan: RunPlan, dataset: Dataset, engine: Engine, tell: Callable[[str, float], None] = lambda network, seconds: None
) -> Forecast:
    """How long a run will take on this machine, as it is now.

    Args:
        tell: receives each network and its seconds as soon as they are known.
    """
    seconds, share = {}, share_of_a_core(engine)
    for part, seconds[part.name] in estimate(plan, dataset, engine):
        tell(part.title, seconds[part.name])
    found = phases(plan, engine)
    return Forecast(sum(duration(phase, seconds) for phase in found), max(phase.jobs for phase in found), share())


def share_of_a_core(engine: Engine) -> Callable[[], float]:
    """Returns a function that says how much of a core this process has had since then; 1 where a GPU computes."""
    began, used = time.monotonic(), time.process_time()
    if engine.device.type != "cpu":
        return lambda: 1.0
    return lambda: (time.process_time() - used) / max(time.monotonic() - began, 1e-9)


def clock_of(engine: Engine) -> Callable[[], float]:
    """Seconds as an idle machine would take them: those of the process, where it has one thread and no GPU."""
    alone = engine.device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def is_worth_timing(plan: RunPlan, dataset: Dataset) -> bool:
    """Whether training takes long enough for a few seconds of timing."""
    trained = [part for part in plan.parts if adaptation(part, plan.config) != "none"]
    images, (height, width) = len(dataset.train), sides(plan.config.data.image_size)
    epochs = sum(recipe_of(part, plan.config, images).epochs for part in trained)
    return images * epochs * height * width >= WORTH_TIMING


def estimate(plan: RunPlan, dataset: Dataset, engine: Engine) -> Iterator[tuple[Part, float]]:
    """Yields each network that a plan trains, and the seconds its training takes on this machine as it is now.

    With the threads that it will have. 0 if it is trained. Evaluation, compilation and filling a cache are not counted.
    """
    config = plan.config
    seconds: dict[tuple[str, str], float] = {}  # all seeds take the same time
    before = torch.get_num_threads()
    for phase in phases(plan, engine):
        for part in phase.parts:
            if adaptation(part, config) == "none":
                continue
            if is_trained(plan.folder, part):
                yield part, 0.0
                continue
            kind = part.role, part.teacher
            if kind not in seconds:
                torch.set_num_threads(threads_of(phase.jobs))
                try:
                    seconds[kind] = _training_seconds(part, config, dataset, engine)
                finally:
                    torch.set_num_threads(before)
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
    views = Views(
        dataset.train, augment_of(part, config), len(dataset.classes), config.data.image_size, part.seed,
        on_device=config.data.views == "device",
    ).on(engine.device)  # fmt: skip
    whole = whole_batch(recipe.batch_size, len(views), recipe.accumulate, engine.processes)
    images = whole // (recipe.accumulate * engine.processes)
    network = initial_network(part, config, dataset.classes)
    asked = config.teachers if part.role == ADVISED and config.cache is None else ()
    advisers = [_adviser(replace(part, role=TEACHER, teacher=name), config, dataset) for name in asked]
    for module in (network, *advisers):
        engine.prepare(module)
    for adviser in advisers:
        adviser.requires_grad_(False).eval()
    only_head = adaptation(part, config) == "probe"
    optimiser = make_optimiser(network.model, recipe)
    averaged = average_of(network, recipe)
    clock = clock_of(engine)

    def step(size: int, number: int) -> tuple[float, float]:
        """Seconds that views of some images and a step on them take."""
        began = clock()
        batch = engine.place(views[0, np.arange(size)])
        engine.synchronise()
        seen = clock()
        if only_head:
            with torch.inference_mode(), engine.autocast():
                network.eval()(batch.images)
        else:
            with engine.autocast():
                for adviser in advisers:
                    adviser(batch.images)
                answers = network.train()(batch.images)
            engine.backward(sum(logits.float().logsumexp(-1).mean() for logits in answers.values()))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if averaged is not None:
                averaged.update(network, number)
        engine.synchronise()
        return seen - began, clock() - seen

    timed = images
    if engine.device.type == "cpu":
        timed, most = min(images, FIRST_IMAGES), min(images, TIMED_IMAGES)
        step(timed, 0)  # makes kernels, which would look like a slow network
        while timed < most:  # an image costs more in a small step
            larger = min(most, GROWTH * timed)
            if sum(step(timed, 1)) * larger / timed > STEP_SECONDS:
                break
            timed = larger
    taken = list[tuple[float, float]]()
    while len(taken) < 3 or sum(map(sum, taken[1:])) < TIMED_SECONDS:
        taken.append(step(timed, len(taken)))
    view, using = (median(times) for times in zip(*taken[1:], strict=True))  # the first builds and allocates
    workers = config.data.workers if views.uses_workers else 0
    seconds = seconds_with_workers(view, using, workers, engine.device.type) * images / timed
    epochs = probe.epochs_of(augment_of(part, config)) if only_head else recipe.epochs
    return seconds * recipe.accumulate * epochs * (len(views) // whole)
