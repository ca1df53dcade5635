"""One network of a run: built or loaded, trained, scored, recorded."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from coadvise.advice import CLASS, LossWeights
from coadvise.config.schema import AugmentConfig, RecipeConfig, RunConfig, names_folder, sides, size_text
from coadvise.data import draws
from coadvise.data.loader import whole_batch
from coadvise.data.scanned import PREPROCESSING, Dataset, ScannedSplit
from coadvise.data.views import Views
from coadvise.distill.logit_cache import StoredLogits, form_of
from coadvise.distill.loss import CoAdvice
from coadvise.distill.teachers import Teachers, check_classes
from coadvise.errors import UserError
from coadvise.evaluation.calibration import calibrated_errors, fit_temperatures
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
from coadvise.models.pretrained import adapted_network, given_network
from coadvise.models.start import start_from
from coadvise.models.token_vit import is_timms
from coadvise.runs.plan import ADVISED, ALONE, START, TEACHER, Part, adaptation
from coadvise.runs.run import Run
from coadvise.storage import MANIFEST, DamagedError, describe_model
from coadvise.training.checkpoint import checkpoint_bytes
from coadvise.training.engine import Engine
from coadvise.training.loop import Advisers, Training, train
from coadvise.training.metrics import last_of, read_records
from coadvise.training.probe import check_head, probe

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
    if adaptation(part, config) != "none":
        recipe = recipe_of(part, config, len(dataset.train))
        whole_batch(recipe.batch_size, len(dataset.train), recipe.accumulate, engine.processes)
        network = initial_network(part, config, dataset.classes)
        if not made:
            check_answers(network, engine.device)
        if part.role == TEACHER and adaptation(part, config) == "probe":
            check_head(part.teacher, network)
        return checkpoint_bytes(network, recipe)
    if not made:
        network = given_network(part.teacher, config.teachers[part.teacher], config.data.image_size)
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
    there, whole = is_trained(run.folder, part), has_whole_predictions(run, part)
    run.engine.barrier()  # all ranks have read the same state; only now may one of them write
    if whole:
        run.listener.say(f"{part.title}: done already")
        return
    if there:
        network = load_network(folder)
    elif adaptation(part, config) == "none":
        network = given_network(part.teacher, config.teachers[part.teacher], config.data.image_size)
        if len(network.classes) > len(run.dataset.classes):
            known, wanted = len(network.classes), len(run.dataset.classes)
            run.listener.say(f"{part.title}: it knows {known} classes; the {wanted} of the data are used")
    else:
        network = initial_network(part, config, run.dataset.classes, run.listener.say)
        if adaptation(part, config) == "probe":
            _probe(run, part, network)
        else:
            job = _job(run, part, network)
            network = train(job, run.checkpoints(part), run.engine, run.record, run.listener.progress)
    if not there:
        of_weights = {key: value for key, value in network.about.items() if key not in PREPROCESSING}  # not a start's
        network.about = of_weights | run.dataset.train.preprocessing
        if run.engine.is_main:
            network.save(folder)
    run.engine.prepare(network)
    kept, labels = _answers(run, part, network, run.dataset.scored)
    found = {name: asdict(score) for name, score in scores(kept, labels).items()}
    calibration = _calibration(run, part, network, kept, labels)
    temperatures = calibration.get("temperature", {})
    if run.engine.is_main:
        if temperatures != network.temperatures:
            rest = {key: value for key, value in network.about.items() if key != "temperatures"}
            describe_model(folder, {**rest, "temperatures": temperatures} if temperatures else rest)
        save_predictions(run.folder, part.name, kept, labels)
        run.checkpoints(part).remove()
    run.record.add(
        "result", part=part.name, role=part.role, name=part.title, model=network.about["model"], seed=part.seed,
        **{figure: {name: score[figure] for name, score in found.items()} for figure in FIGURES},
        **calibration, parameters=network.parameter_count,
    )  # fmt: skip
    run.listener.say(
        f"{part.title}: top-1 " + ", ".join(f"{name} {score['top1']:.1%}" for name, score in found.items())
    )
    if calibration:
        before, after = found[CLASS]["ece"], calibration["calibrated_ece"][CLASS]
        run.listener.say(
            f"{part.title}: temperature {temperatures[CLASS]:.3g}, fitted on val: calibration error {before:.1%} -> "
            f"{after:.1%}"
        )
    run.engine.barrier()


def _answers(run: Run, part: Part, network: Network, split: ScannedSplit) -> tuple[dict[str, Tensor], Tensor]:
    """Logits [N, K] of the data's classes by trained token, and labels [N]."""
    config = run.config
    logits = predict_logits(network, split, config.data.image_size, run.engine, config.data.workers)
    logits = in_order(logits, network.classes, run.dataset.classes)
    trained = loss_weights_of(part, config).trained_tokens
    return {name: logits[name] for name in trained}, torch.from_numpy(split.labels)


def _calibration(
    run: Run, part: Part, network: Network, scored: Mapping[str, Tensor], labels: Tensor
) -> dict[str, dict[str, float]]:
    """Temperatures fitted on val, and the calibration error with them where finished networks are scored.

    Empty without a test split, since nothing is fitted on what is scored, and for a given teacher of other classes,
    whose answers would be scaled for all of them.
    """
    if run.dataset.test is None or tuple(network.classes) != tuple(run.dataset.classes):
        return {}
    temperatures = fit_temperatures(*_answers(run, part, network, run.dataset.val))
    return {"temperature": temperatures, "calibrated_ece": calibrated_errors(scored, labels, temperatures)}


def has_whole_predictions(run: Run, part: Part) -> bool:
    """Whether nothing is left to do for a network. Damaged predictions are computed again."""
    if not is_done(run.folder, part):
        return False
    try:
        _, labels = load_predictions(run.folder, part.name)
    except DamagedError as error:
        run.listener.say(f"{part.title}: damaged predictions, computed again: {error}")
        return False
    return len(labels) == len(run.dataset.scored)


def _probe(run: Run, part: Part, network: Network) -> None:
    """Trains a network's head alone."""
    _, views = _seed_and_views(run, part)
    weights, engine = run.loss_class_weights, run.engine
    found = probe(
        part.name, network, views.on(engine.device), engine, run.config.data.workers,
        None if weights is None else weights.tolist(), run.listener.progress,
    )  # fmt: skip
    run.record.add("probe", part=part.name, **asdict(found))
    run.listener.say(
        f"{part.title}: its head is trained on {found.views} views, weight decay {found.weight_decay:g} "
        f"({found.top1:.1%} of held-out training images)"
    )


def _seed_and_views(run: Run, part: Part) -> tuple[int, Views]:
    config = run.config
    if part.role not in (TEACHER, START):
        return part.seed, run.student_views(part.seed)
    seed = teacher_seed(config.seed, part.teacher) if part.role == TEACHER else part.seed
    augment = augment_of(part, config)
    return seed, run.views(augment.unmixed if adaptation(part, config) == "probe" else augment, seed)


def _job(run: Run, part: Part, network: Network) -> Training:
    config = run.config
    advised = part.role == ADVISED
    seed, views = _seed_and_views(run, part)
    return Training(
        part=part.name,
        seed=seed,
        network=network,
        recipe=recipe_of(part, config, len(run.dataset.train)),
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


def loss_weights_of(part: Part, config: RunConfig) -> LossWeights:
    """What trains a network: Eq. (1), or the labels alone."""
    if part.role in (TEACHER, START):
        return LossWeights()
    return config.loss_weights if part.role == ADVISED else config.loss_weights.without_advice


def augment_of(part: Part, config: RunConfig) -> AugmentConfig:
    """How a network's views are made: a teacher's own way, if it has one, else the run's."""
    own = config.teachers[part.teacher].augment if part.role == TEACHER else None
    return own or config.augment


def recipe_of(part: Part, config: RunConfig, images: int) -> RecipeConfig:
    """A network's recipe; that of fine-tuning depends on the number of training images."""
    if part.role != TEACHER:
        return config.student.recipe
    teacher = config.teachers[part.teacher]
    return teacher.finetune.recipe(teacher.recipe, images) if teacher.adaptation == "finetune" else teacher.recipe


def initial_network(
    part: Part, config: RunConfig, classes: Sequence[str], say: Callable[[str], None] = lambda text: None
) -> Network:
    """A network before its training. An advised student and the same one alone start from the same weights.

    Args:
        say: receives notes about weights that a start lacks.
    """
    if part.role == TEACHER:
        teacher, size = config.teachers[part.teacher], config.data.image_size
        seed = teacher_seed(config.seed, part.teacher)
        if teacher.start is None:
            return build_network(teacher, classes, size, seed)
        network, note = adapted_network(part.teacher, teacher, classes, size, seed)
        _check_size(part, network, config)
        if note:
            say(f"{part.title}: starts from {teacher.start}, {note}")
        return network
    start = str(config.student.start)
    bare = part.role == START and is_timms(config.student.model) and not names_folder(start)
    tokens = () if bare else config.tokens  # a run's student comes with its tokens, and ours with their stems
    network = build_network(config.student, classes, config.data.image_size, part.seed, tokens=tokens)
    assert isinstance(network.model, TokenModel)
    if config.student.start is not None:
        for note in start_from(network, config.student.start, part.seed):
            say(note)
    if part.role in (ALONE, START):
        network.model.train_heads(loss_weights_of(part, config).trained_tokens)
    return network


def teacher_seed(seed: int, name: str) -> int:
    """A teacher's own seed, so that two teachers of the same architecture differ."""
    return draws.scalar_seed(seed, draws.TEACHER, 0, zlib.crc32(name.encode())) % 2**31


def _check_given(part: Part, network: Network, config: RunConfig, classes: tuple[str, ...]) -> None:
    """Raises UserError unless a given teacher knows the data's classes and takes images of its size."""
    check_classes(part.teacher, network, classes)
    _check_size(part, network, config)


def _check_size(part: Part, network: Network, config: RunConfig) -> None:
    size = config.data.image_size
    if network.fixed_image_size and sides(network.image_size) != sides(size):
        raise UserError(
            f"teacher '{part.teacher}' takes images of {size_text(network.about['image_size'])} pixels only, "
            f"data.image_size is {size_text(size)}; give a teacher trained at that size, or leave it out to train one "
            "here"
        )
