"""One network of a run: made or had, trained, scored, recorded."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from coadvise.advice import CLASS, LossWeights
from coadvise.config import RecipeConfig, RunConfig
from coadvise.data import draws
from coadvise.data.loader import whole_batch
from coadvise.data.scan import Dataset
from coadvise.data.views import Views
from coadvise.distill.logit_cache import StoredLogits, form_of
from coadvise.distill.loss import CoAdvice
from coadvise.distill.teachers import Teachers, check_classes
from coadvise.errors import UserError
from coadvise.evaluation.scores import in_order, load_predictions, predict_logits, save_predictions, scores, top1
from coadvise.models import TokenModel
from coadvise.models.network import Network, build_network, check_answers, load_network
from coadvise.models.pretrained import given_network, start_from
from coadvise.runs.plan import ADVISED, ALONE, TEACHER, Arm
from coadvise.runs.run import Run, cache_of
from coadvise.storage import MANIFEST, DamagedError
from coadvise.training.engine import Engine
from coadvise.training.loop import Advisers, Training, checkpoint_bytes, train
from coadvise.training.metrics import last_of, read_records


def check_arm(arm: Arm, folder: Path, config: RunConfig, dataset: Dataset, engine: Engine) -> int:
    """Raises UserError for a network that cannot be made, had or trained. Returns the bytes of its checkpoint, or 0."""
    if trained_here(arm, config):
        recipe = recipe_of(arm, config)
        whole_batch(recipe.batch_size, len(dataset.train), recipe.accumulate, engine.processes)
        network = initial_network(arm, config, dataset.classes)
        if not is_trained(folder, arm):
            check_answers(network, engine.device)
        return checkpoint_bytes(network, recipe)
    if not is_trained(folder, arm):
        _check_given(arm, given_network(config.teachers[arm.teacher], config.data.image_size), config, dataset.classes)
    return 0


def is_trained(folder: Path, arm: Arm) -> bool:
    """Whether the run in `folder` has the network."""
    return (folder / arm.part / MANIFEST).is_file()


def is_done(folder: Path, arm: Arm) -> bool:
    """Whether a network of the run in `folder` is trained and scored."""
    return is_trained(folder, arm) and last_of(read_records(folder), "result", arm.part) is not None


def train_arm(run: Run, arm: Arm) -> None:
    """Trains one network to its end, scores it, records the result; what is done already is not done again."""
    folder, config = run.folder / arm.part, run.config
    there, whole = is_trained(run.folder, arm), _has_whole_predictions(run, arm)
    run.engine.barrier()  # all have looked, and find the same: only now may one of them write
    if whole:
        run.listener.say(f"{arm.name}: done already")
        return
    if there:
        network = load_network(folder)
    elif not trained_here(arm, config):
        network = given_network(config.teachers[arm.teacher], config.data.image_size)
        if len(network.classes) > len(run.dataset.classes):
            known, wanted = len(network.classes), len(run.dataset.classes)
            run.listener.say(f"{arm.name}: of the {known} classes it knows it answers for the {wanted} of the data")
        if run.engine.is_main:
            network.save(folder)
    else:
        network = initial_network(arm, config, run.dataset.classes, run.listener.say)
        network = train(_job(run, arm, network), run.checkpoints(arm), run.engine, run.record, run.listener.progress)
        if run.engine.is_main:
            network.save(folder)
    run.engine.prepare(network)
    logits = predict_logits(network, run.dataset.val, config.data.image_size, run.engine, config.data.workers)
    logits = in_order(logits, network.classes, run.dataset.classes)
    trained = config.loss_weights.trained_tokens if arm.role == ADVISED else (CLASS,)
    labels = torch.from_numpy(run.dataset.val.labels)
    kept = {name: logits[name] for name in trained}
    found = {name: asdict(score) for name, score in scores(kept, labels).items()}
    if run.engine.is_main:
        save_predictions(run.folder, arm.part, kept, labels)
        run.checkpoints(arm).remove()
    run.record.add(
        "result", part=arm.part, role=arm.role, name=arm.name, model=network.about["model"], seed=arm.seed,
        **{figure: {name: score[figure] for name, score in found.items()} for figure in ("top1", "top5", "ece", "nll")},
        parameters=network.parameter_count,
    )  # fmt: skip
    run.listener.say(f"{arm.name}: top-1 " + ", ".join(f"{name} {score['top1']:.1%}" for name, score in found.items()))
    run.engine.barrier()


def _has_whole_predictions(run: Run, arm: Arm) -> bool:
    """Whether nothing is left to do for a network; damaged predictions are made again."""
    if not is_done(run.folder, arm):
        return False
    try:
        _, labels = load_predictions(run.folder, arm.part)
    except DamagedError as error:
        run.listener.say(f"{arm.name}: damaged predictions, made again: {error}")
        return False
    return len(labels) == len(run.dataset.val)


def _job(run: Run, arm: Arm, network: Network) -> Training:
    config = run.config
    advised = arm.role == ADVISED
    if arm.role == TEACHER:
        seed = teacher_seed(config.seed, arm.teacher)
        augment = config.teachers[arm.teacher].augment or config.augment
        views = Views(run.dataset.train, augment, len(run.dataset.classes), config.data.image_size, seed)
    else:
        seed, views = arm.seed, run.student_views(arm.seed)
    return Training(
        part=arm.part,
        seed=seed,
        network=network,
        recipe=recipe_of(arm, config),
        views=views.on(run.engine.device),
        teachers=_advisers(run, arm.seed) if advised else Teachers({}),
        losses=CoAdvice(config.loss_weights if advised else LossWeights()),
        evaluate=partial(_evaluate, run, arm),
        workers=config.data.workers,
        checkpoint_seconds=config.engine.checkpoint_seconds,
        max_unreadable=config.data.max_unreadable,
    )


def _evaluate(run: Run, arm: Arm, network: nn.Module, step: int) -> dict[str, float]:
    """Top-1 on the validation images by answer, of those that training shapes."""
    config, val = run.config, run.dataset.val
    logits = predict_logits(network, val, config.data.image_size, run.engine, config.data.workers)
    if broken := [name for name, values in logits.items() if not values.isfinite().all()]:
        raise UserError(
            f"{arm.part}: after step {step} its answers for validation images are not finite ({', '.join(broken)}); "
            "lower learning_rate or set clip, and go on from the last checkpoint with --allow-changes, or start anew"
        )
    tokens = config.loss_weights.trained_tokens if arm.role == ADVISED else (CLASS,)
    return top1(logits, torch.from_numpy(val.labels), tokens)


def _advisers(run: Run, seed: int) -> Advisers:
    """What an advised student learns from: the run's teachers, or what they said of its views."""
    if run.cache is None:
        return run.load_teachers()
    return StoredLogits(cache_of(run, seed), tuple(run.config.teachers), form_of(run.config, len(run.dataset.classes)))


def trained_here(arm: Arm, config: RunConfig) -> bool:
    return arm.role != TEACHER or config.teachers[arm.teacher].trained_here


def recipe_of(arm: Arm, config: RunConfig) -> RecipeConfig:
    return config.teachers[arm.teacher].recipe if arm.role == TEACHER else config.student.recipe


def initial_network(
    arm: Arm, config: RunConfig, classes: Sequence[str], say: Callable[[str], None] = lambda text: None
) -> Network:
    """An untrained network; an advised student and the same one alone start from the same weights.

    Args:
        say: is told what a student that starts from a file of weights does not find there.
    """
    if arm.role == TEACHER:
        teacher = config.teachers[arm.teacher]
        return build_network(teacher, classes, config.data.image_size, teacher_seed(config.seed, arm.teacher))
    network = build_network(config.student, classes, config.data.image_size, arm.seed, tokens=config.tokens)
    assert isinstance(network.model, TokenModel)
    if config.student.start is not None:
        for note in start_from(network, config.student.start, arm.seed):
            say(note)
    if arm.role == ALONE:
        network.model.freeze_advised_heads()
    return network


def teacher_seed(seed: int, name: str) -> int:
    """A teacher's own seed, so that two teachers of one architecture differ."""
    return draws.scalar_seed(seed, draws.TEACHER, 0, zlib.crc32(name.encode())) % 2**31


def _check_given(arm: Arm, network: Network, config: RunConfig, classes: tuple[str, ...]) -> None:
    """A given teacher must answer for the data's classes and take its images."""
    check_classes(arm.teacher, network, classes)
    if network.fixed_image_size and network.about["image_size"] != config.data.image_size:
        raise UserError(
            f"teacher '{arm.teacher}' takes images of {network.about['image_size']} pixels only, data.image_size is "
            f"{config.data.image_size}; give a teacher trained at that size, or none to have one trained here"
        )
