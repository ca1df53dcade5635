"""One network of a run: built or loaded, trained, scored, recorded."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn

from coadvise.advice import LossWeights
from coadvise.config import RecipeConfig, RunConfig, sides, size_text
from coadvise.data import draws
from coadvise.data.loader import whole_batch
from coadvise.data.scan import Dataset
from coadvise.distill.logit_cache import StoredLogits, form_of
from coadvise.distill.loss import CoAdvice
from coadvise.distill.teachers import Teachers, check_classes
from coadvise.errors import UserError
from coadvise.evaluation.scores import (
    Scores,
    in_order,
    load_predictions,
    predict_logits,
    save_predictions,
    scores,
    top1,
)
from coadvise.models import TokenModel
from coadvise.models.network import Network, build_network, check_answers, load_network
from coadvise.models.pretrained import given_network, start_from
from coadvise.runs.plan import ADVISED, ALONE, TEACHER, Part
from coadvise.runs.run import Run
from coadvise.storage import MANIFEST, DamagedError
from coadvise.training.checkpoint import checkpoint_bytes
from coadvise.training.engine import Engine
from coadvise.training.loop import Advisers, Training, train
from coadvise.training.metrics import last_of, read_records

FIGURES = tuple(field.name for field in fields(Scores))  # of a result


def check_part(
    part: Part, folder: Path, config: RunConfig, dataset: Dataset, engine: Engine, outdated: bool = False
) -> int:
    """Raises UserError for a network that cannot be built, loaded or trained.

    Args:
        outdated: a finished network will be made again.

    Returns:
        The size of its checkpoint, bytes; 0 if it is not trained here.
    """
    made = is_trained(folder, part) and not outdated
    if trained_here(part, config):
        recipe = recipe_of(part, config)
        whole_batch(recipe.batch_size, len(dataset.train), recipe.accumulate, engine.processes)
        network = initial_network(part, config, dataset.classes)
        if not made:
            check_answers(network, engine.device)
        return checkpoint_bytes(network, recipe)
    if not made:
        network = given_network(config.teachers[part.teacher], config.data.image_size)
        _check_given(part, network, config, dataset.classes)
    return 0


def is_trained(folder: Path, part: Part) -> bool:
    """Whether the run in `folder` has the finished network."""
    return (folder / part.name / MANIFEST).is_file()


def is_done(folder: Path, part: Part) -> bool:
    """Whether a network of the run in `folder` is trained and scored."""
    return is_trained(folder, part) and last_of(read_records(folder), "result", part.name) is not None


def train_part(run: Run, part: Part) -> None:
    """Trains one network, scores it and records the result. Skips what is done."""
    folder, config = run.folder / part.name, run.config
    there, whole = is_trained(run.folder, part), _has_whole_predictions(run, part)
    run.engine.barrier()  # all ranks have read the same state; only now may one of them write
    if whole:
        run.listener.say(f"{part.title}: done already")
        return
    if there:
        network = load_network(folder)
    elif not trained_here(part, config):
        network = given_network(config.teachers[part.teacher], config.data.image_size)
        if len(network.classes) > len(run.dataset.classes):
            known, wanted = len(network.classes), len(run.dataset.classes)
            run.listener.say(f"{part.title}: it knows {known} classes; the {wanted} of the data are used")
        network.about |= run.dataset.train.unusual  # of its own run it may have others
        if run.engine.is_main:
            network.save(folder)
    else:
        network = initial_network(part, config, run.dataset.classes, run.listener.say)
        network = train(_job(run, part, network), run.checkpoints(part), run.engine, run.record, run.listener.progress)
        network.about |= run.dataset.train.unusual
        if run.engine.is_main:
            network.save(folder)
    run.engine.prepare(network)
    logits = predict_logits(network, run.dataset.scored, config.data.image_size, run.engine, config.data.workers)
    logits = in_order(logits, network.classes, run.dataset.classes)
    trained = loss_weights_of(part, config).trained_tokens
    labels = torch.from_numpy(run.dataset.scored.labels)
    kept = {name: logits[name] for name in trained}
    found = {name: asdict(score) for name, score in scores(kept, labels).items()}
    if run.engine.is_main:
        save_predictions(run.folder, part.name, kept, labels)
        run.checkpoints(part).remove()
    run.record.add(
        "result", part=part.name, role=part.role, name=part.title, model=network.about["model"], seed=part.seed,
        **{figure: {name: score[figure] for name, score in found.items()} for figure in FIGURES},
        parameters=network.parameter_count,
    )  # fmt: skip
    run.listener.say(
        f"{part.title}: top-1 " + ", ".join(f"{name} {score['top1']:.1%}" for name, score in found.items())
    )
    run.engine.barrier()


def _has_whole_predictions(run: Run, part: Part) -> bool:
    """Whether nothing is left to do for a network. Damaged predictions are computed again."""
    if not is_done(run.folder, part):
        return False
    try:
        _, labels = load_predictions(run.folder, part.name)
    except DamagedError as error:
        run.listener.say(f"{part.title}: damaged predictions, computed again: {error}")
        return False
    return len(labels) == len(run.dataset.scored)


def _job(run: Run, part: Part, network: Network) -> Training:
    config = run.config
    advised = part.role == ADVISED
    if part.role == TEACHER:
        seed = teacher_seed(config.seed, part.teacher)
        views = run.views(config.teachers[part.teacher].augment or config.augment, seed)
    else:
        seed, views = part.seed, run.student_views(part.seed)
    return Training(
        part=part.name,
        seed=seed,
        network=network,
        recipe=recipe_of(part, config),
        views=views.on(run.engine.device),
        teachers=_advisers(run, part.seed) if advised else Teachers({}),
        losses=CoAdvice(loss_weights_of(part, config), run.loss_class_weights),
        evaluate=partial(_evaluate, run, part),
        workers=config.data.workers,
        checkpoint_seconds=config.engine.checkpoint_seconds,
        max_unreadable=config.data.max_unreadable,
    )


def _evaluate(run: Run, part: Part, network: nn.Module, step: int) -> dict[str, float]:
    """Top-1 on the validation images, of each output head that is trained."""
    config, val = run.config, run.dataset.val
    logits = predict_logits(network, val, config.data.image_size, run.engine, config.data.workers)
    if broken := [name for name, values in logits.items() if not values.isfinite().all()]:
        raise UserError(
            f"{part.name}: after step {step} its logits for validation images are not finite ({', '.join(broken)}); "
            "lower learning_rate or set clip, and continue with --allow-changes from the last checkpoint, or start over"
        )
    return top1(logits, torch.from_numpy(val.labels), loss_weights_of(part, config).trained_tokens)


def _advisers(run: Run, seed: int) -> Advisers:
    """What advises a student: the run's teachers, or their stored logits."""
    if run.cache is None:
        return run.load_teachers()
    return StoredLogits(
        run.logit_cache(seed), tuple(run.config.teachers), form_of(run.config, len(run.dataset.classes))
    )


def trained_here(part: Part, config: RunConfig) -> bool:
    return part.role != TEACHER or config.teachers[part.teacher].trained_here


def loss_weights_of(part: Part, config: RunConfig) -> LossWeights:
    """What trains a network: Eq. (1), or the labels alone."""
    if part.role == TEACHER:
        return LossWeights()
    return config.loss_weights if part.role == ADVISED else config.loss_weights.without_advice


def recipe_of(part: Part, config: RunConfig) -> RecipeConfig:
    return config.teachers[part.teacher].recipe if part.role == TEACHER else config.student.recipe


def initial_network(
    part: Part, config: RunConfig, classes: Sequence[str], say: Callable[[str], None] = lambda text: None
) -> Network:
    """An untrained network. An advised student and the same one alone start from the same weights.

    Args:
        say: receives notes about weights that a student's start file lacks.
    """
    if part.role == TEACHER:
        teacher = config.teachers[part.teacher]
        return build_network(teacher, classes, config.data.image_size, teacher_seed(config.seed, part.teacher))
    network = build_network(config.student, classes, config.data.image_size, part.seed, tokens=config.tokens)
    assert isinstance(network.model, TokenModel)
    if config.student.start is not None:
        for note in start_from(network, config.student.start, part.seed):
            say(note)
    if part.role == ALONE:
        network.model.train_heads(loss_weights_of(part, config).trained_tokens)
    return network


def teacher_seed(seed: int, name: str) -> int:
    """A teacher's own seed, so that two teachers of the same architecture differ."""
    return draws.scalar_seed(seed, draws.TEACHER, 0, zlib.crc32(name.encode())) % 2**31


def _check_given(part: Part, network: Network, config: RunConfig, classes: tuple[str, ...]) -> None:
    """Raises UserError unless a given teacher knows the data's classes and takes images of its size."""
    check_classes(part.teacher, network, classes)
    size = config.data.image_size
    if network.fixed_image_size and sides(network.about["image_size"]) != sides(size):
        raise UserError(
            f"teacher '{part.teacher}' takes images of {size_text(network.about['image_size'])} pixels only, "
            f"data.image_size is {size_text(size)}; give a teacher trained at that size, or leave it out to train one "
            "here"
        )
