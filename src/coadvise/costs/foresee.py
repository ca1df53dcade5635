"""What a preset costs on a machine: minutes, memory, cores and bytes of each network, and what holds it up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coadvise.config.reading import with_changes
from coadvise.config.schema import HUB, ModelConfig, RunConfig, sides
from coadvise.costs import sizes
from coadvise.costs.count import Counted, count
from coadvise.costs.machine import HALF, Target
from coadvise.costs.rates import Rates
from coadvise.costs.step import TrainingStep, materialise
from coadvise.data.loader import whole_batch
from coadvise.errors import UserError
from coadvise.models import TokenModel
from coadvise.models.network import Network, build_network, on_meta
from coadvise.runs.network_job import augment_of, loss_weights_of, recipe_of
from coadvise.runs.plan import ADVISED, ALONE, START, TEACHER, Part, RunPlan, adaptation, run_parts
from coadvise.runs.schedule import Phase, duration, phases, threads_of
from coadvise.training import probe
from coadvise.training.checkpoint import checkpoint_bytes
from coadvise.training.engine import Engine

HIDDEN = 0.6  # of a step's computation, its backward pass, goes on while gradients are exchanged


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Attributes:
        images: training images.
        gpus: of each node; 0 where networks run on a CPU.
        network: bytes a second that a node sends to another.
    """

    config: RunConfig
    images: int
    classes: int
    target: Target
    gpus: int
    nodes: int = 1
    seeds: int = 1
    baseline: bool = False
    network: float = sizes.NODE_NETWORK

    @property
    def processes(self) -> int:
        """That train one network together."""
        return max(1, self.gpus) * self.nodes

    @property
    def half(self) -> bool:
        precision = self.config.engine.precision
        return self.target.has_half() if precision == "auto" else precision == HALF


@dataclass(frozen=True)
class Foreseen:
    """One network.

    Attributes:
        epochs, steps: in all.
        images: of a micro-batch on one process.
        computing: seconds of a step on the device, by kind of operation; not with `issuing`.
        issuing: seconds in which its operations are issued.
        teachers: share of the computation that advising teachers take.
        making: seconds of one core for a process's views of a step.
        exchanging: seconds of a step in which gradients are sent and received.
        waiting: those of them that computing does not hide.
        seconds: of a step.
        memory: bytes at its peak, of a process.
        largest: images of a micro-batch that fit into the memory there is.
        cores: loader cores of a node that make views as fast as they are used.
        sent: bytes that a process sends in a step.
        checkpoint: bytes of one.
    """

    part: Part
    epochs: int
    steps: int
    batch: int
    images: int
    computing: dict[str, float]
    issuing: float
    teachers: float
    making: float
    exchanging: float
    waiting: float
    seconds: float
    memory: float
    largest: int
    cores: float
    sent: float
    checkpoint: int

    @property
    def minutes(self) -> float:
        return self.steps * self.seconds / 60


@dataclass(frozen=True)
class Plan:
    """All networks of a run, until all are trained, and the bytes on disks."""

    question: Question
    networks: tuple[Foreseen, ...]
    minutes: float
    jobs: int
    disk: sizes.Disk


def foresee(question: Question) -> Plan:
    """Foresees a run. Evaluation, the first scan, compilation and filling a cache are not counted.

    Raises:
        UserError: a network that cannot be built or counted, or a batch that cannot be divided among the processes.
    """
    config = question.config
    parts = tuple(run_parts(config, question.seeds, question.baseline))
    # On GPUs and several nodes networks are trained one after the other, each by all.
    alone = question.target.gpu or question.nodes > 1
    planned = RunPlan(Path(), config, parts, jobs=None)
    schedule = [Phase(parts, 1)] if alone else phases(planned, Engine(config.engine))
    found: dict[str, Foreseen] = {}
    for phase in schedule:
        for part in (part for part in phase.parts if adaptation(part, config) != "none"):
            twin = next((one for one in found.values() if _kind(one.part) == _kind(part)), None)
            found[part.name] = replace(twin, part=part) if twin else network_of(question, part, threads_of(phase.jobs))
    minutes = {name: one.minutes for name, one in found.items()}
    networks = tuple(found.values())
    largest, jobs = max((one.checkpoint for one in networks), default=0), max(phase.jobs for phase in schedule)
    return Plan(
        question, networks, sum(duration(phase, minutes) for phase in schedule), jobs,
        sizes.disk(config, question.images, question.classes, question.seeds, jobs * largest),
    )  # fmt: skip


def _kind(part: Part) -> tuple[str, str]:
    return part.role, part.teacher  # all seeds take the same


def network_of(question: Question, part: Part, threads: int) -> Foreseen:
    """Foresees one network that is trained.

    Args:
        threads: that it has, on a CPU.
    """
    config, target, processes = question.config, question.target, question.processes
    recipe, only_head = recipe_of(part, config, question.images), adaptation(part, config) == "probe"
    whole = whole_batch(recipe.batch_size, question.images, recipe.accumulate, processes)
    images = whole // (recipe.accumulate * processes)
    augment = augment_of(part, config)
    advisers = list(config.teachers) if part.role == ADVISED and config.cache is None else []
    rates = target.rates(question.half, threads)
    network, *asked = (_shapes(config, other, question.classes) for other in _asked(part, advisers))

    def step() -> TrainingStep:
        for module in (network, *asked):
            materialise(module)
        plain = question.half and not target.gpu
        return TrainingStep(network, None if only_head else recipe, asked, question.half, plain)

    own, double = count(step, (images, 2 * images), config.data.image_size, recipe.accumulate, gpu=target.gpu)
    computing, issuing = rates.by_kind(own), rates.issuing(own)
    using = rates.seconds(own)
    a_view = _view_seconds(question, augment.kind)
    making = a_view * images * recipe.accumulate
    exchanging = sizes.exchange_seconds(own, processes, question.nodes, target.link, question.network)
    waiting = max(0.0, exchanging - HIDDEN * using)
    seconds = _step_seconds(making, using + waiting, config.data.workers, target.gpu)
    epochs = probe.epochs_of(augment) if only_head else recipe.epochs
    return Foreseen(
        part=part, epochs=epochs, steps=epochs * (question.images // whole), batch=whole, images=images,
        computing=computing, issuing=issuing, teachers=_teachers_share(question, rates, advisers, images, using),
        making=making, exchanging=exchanging, waiting=waiting, seconds=seconds, memory=own.peak,
        largest=largest_batch(own, double, images, target.memory),
        cores=making / (using + waiting) * max(1, question.gpus), sent=sizes.sent(own, processes),
        checkpoint=checkpoint_bytes(network, recipe),
    )  # fmt: skip


def largest_batch(own: Counted, double: Counted, images: int, memory: float) -> int:
    """Images that fit, on the line through what is held with some images and with twice as many; 0 for none."""
    each = (double.peak - own.peak) / images
    return max(0, int((memory - own.peak) // each) + images)


def _step_seconds(making: float, using: float, workers: int, gpu: bool) -> float:
    """Seconds of a step. Loader processes work beside a GPU, and take turns with the networks on a CPU."""
    return max(making / workers, using) if gpu and workers else making / max(1, workers) + using


def _view_seconds(question: Question, kind: str) -> float:
    """Of one core for a view; 0 where the GPU makes them."""
    height, width = sides(question.config.data.image_size)
    if kind == "none" or (question.target.gpu and kind == "light"):
        return 0.0
    name = "presized" if kind == "deit" and question.config.data.presize else kind
    return question.target.views[name].seconds(height * width)


def _teachers_share(question: Question, rates: Rates, names: Sequence[str], images: int, using: float) -> float:
    """Share of an advised student's step that its teachers take."""
    if not names:
        return 0.0
    config = question.config

    def seconds(name: str) -> float:
        network = _shapes(config, Part("", TEACHER, 0, name), question.classes)

        def step() -> TrainingStep:
            materialise(network)
            return TrainingStep(network, None, (), question.half, question.half and not question.target.gpu)

        (counted,) = count(step, [images], config.data.image_size, gpu=question.target.gpu)
        return rates.seconds(counted)

    return min(1.0, config.student.recipe.accumulate * sum(map(seconds, names)) / using)


def _asked(part: Part, advisers: Sequence[str]) -> list[Part]:
    return [part, *(Part("", TEACHER, 0, name) for name in advisers)]


def _shapes(config: RunConfig, part: Part, classes: int) -> Network:
    """A network's architecture, whatever weights it starts from, with shapes alone."""
    names = [str(number) for number in range(classes)]
    given: ModelConfig = config.teachers[part.teacher] if part.role == TEACHER else config.student
    if given.model.startswith(HUB):
        raise UserError(
            f"'{given.model}' is a hub's, and a plan downloads nothing; give the name in timm of that model"
        )
    tokens = None if part.role == TEACHER else () if part.role == START else config.tokens
    built = on_meta(lambda: build_network(given, names, config.data.image_size, part.seed, tokens=tokens))
    assert isinstance(built, Network)
    if part.role in (ALONE, START) and isinstance(built.model, TokenModel):
        built.model.train_heads(loss_weights_of(part, config).trained_tokens)
    return built


def with_pixels(config: RunConfig, pixels: int | None) -> RunConfig:
    """The configuration at another image size. Raises UserError for one that is not possible."""
    return config if pixels is None else with_changes(config, {"data.image_size": pixels})
