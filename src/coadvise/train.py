"""The training loop: one for teachers (nobody advises them), advised students, and students alone."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from coadvise.checkpoint import Checkpoints, read_state, read_weights
from coadvise.config import RecipeConfig
from coadvise.data import draws
from coadvise.data.audit import AuditedSplit
from coadvise.data.loader import TrainingLoader
from coadvise.data.views import Batch, Views
from coadvise.engine import Engine, Interrupted
from coadvise.errors import UserError
from coadvise.evaluate import predict_logits, top1
from coadvise.loss import CLASS, LossWeights, co_advise_loss
from coadvise.networks import Network
from coadvise.optim import learning_rate, make_optimiser
from coadvise.record import Recorder

Advisers = Callable[[Batch], Mapping[str, Tensor]]  # logits by token: `Teachers`, or `StoredLogits` of a cache
Progress = Callable[[str, int, int, Mapping[str, float]], None]  # part, steps done, steps in all, latest figures


@dataclass(frozen=True)
class Training:
    """One network to train.

    Attributes:
        part: its name in the record and its folder in the run directory, such as "students/advised-0".
        seed: decides its views and its dropout; its initial weights came with `network`.
        teachers: logits by token for a batch, from teachers on the engine's device or from a cache; an empty dict for
            a teacher or a student alone.
        checkpoint_seconds: at least this long between checkpoints; they are written at the end of an epoch.
    """

    part: str
    seed: int
    network: Network
    recipe: RecipeConfig
    views: Views
    val: AuditedSplit
    teachers: Advisers
    weights: LossWeights
    workers: int
    checkpoint_seconds: float


def train(job: Training, checkpoints: Checkpoints, engine: Engine, record: Recorder, progress: Progress) -> Network:
    """Trains a network from its last checkpoint, or from the start, to its end.

    Returns:
        The network with the weights it answers with: averaged ones where the recipe has EMA.

    Raises:
        Interrupted: a signal asked for a stop; the step at hand is saved.
        UserError: the loss is no longer finite.
    """
    recipe, network = job.recipe, job.network
    engine.prepare(network)  # first: optimiser and average follow the weights
    loader = TrainingLoader(job.views, recipe.batch_size, recipe.accumulate, job.workers, engine.rank, engine.processes)
    per_epoch, last_step = loader.steps_per_epoch, recipe.epochs * loader.steps_per_epoch
    optimiser = make_optimiser(network.model, recipe)
    averaged = ModelEmaV3(network, decay=recipe.ema, use_warmup=True, foreach=True) if recipe.ema else None
    answering = averaged.module if averaged else network
    sums: dict[str, Tensor] = {}  # of the losses since the epoch began
    first_step = _resume(job.part, network, optimiser, averaged, sums, checkpoints, record)
    model, optimiser = engine.setup(network, optimiser)
    evaluate_after = {math.ceil(recipe.epochs * (n + 1) / recipe.evaluations) for n in range(recipe.evaluations)}
    began = saved = time.monotonic()
    network.train()

    for step, micro_batches in enumerate(loader.steps(first_step, last_step), first_step):
        rate = learning_rate(step, per_epoch, recipe)
        for group in optimiser.param_groups:
            group["lr"] = rate
        torch.manual_seed(draws.scalar_seed(job.seed, draws.STEP, step, engine.rank))  # dropout, stochastic depth

        for number, micro_batch in enumerate(micro_batches, 1):
            batch = engine.place(micro_batch)
            with engine.accumulating(model, number < len(micro_batches)):
                with engine.autocast():
                    advice = job.teachers(batch)
                losses = co_advise_loss(model(batch.images), advice, batch.labels, job.weights)
                engine.backward(losses["total"] / len(micro_batches))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(micro_batches)

        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if averaged is not None:
            averaged.update(network, step)

        figures: dict[str, float] = {}
        epoch, within = divmod(step + 1, per_epoch)
        if within == 0:
            speed = round((step + 1 - first_step) * loader.batch_size / (time.monotonic() - began), 1)
            figures = _mean_losses(sums, per_epoch, job.part, step + 1, engine)
            where = {"part": job.part, "seed": job.seed, "step": step + 1, "epoch": epoch}
            record.add("train", **where, learning_rate=rate, losses=dict(figures), images_per_second=speed)
            if epoch in evaluate_after:
                logits = predict_logits(answering, job.val, job.views.image_size, engine, job.workers)
                scores = top1(logits, torch.from_numpy(job.val.labels), job.weights.trained_tokens)
                record.add("eval", **where, top1=scores)
                figures["top1"] = scores[CLASS]
            sums.clear()
        progress(job.part, step + 1, last_step, figures)

        stop = engine.stop_requested and step + 1 < last_step
        if stop or (within == 0 and time.monotonic() - saved >= job.checkpoint_seconds and step + 1 < last_step):
            _save(step + 1, network, optimiser, averaged, sums, checkpoints, engine)
            saved = time.monotonic()
        if stop:
            raise Interrupted(f"stopped at step {step + 1} of {last_step} of {job.part}")

    return answering.eval()


def _save(
    step: int, network: Network, optimiser: torch.optim.Optimizer, averaged: ModelEmaV3 | None, sums: dict[str, Tensor],
    checkpoints: Checkpoints, engine: Engine,
) -> None:  # fmt: skip
    if engine.is_main:
        ema = averaged.module.model.state_dict() if averaged else None
        state = {"step": step, "optimiser": optimiser.state_dict(), "ema": ema, "sums": dict(sums)}
        checkpoints.save(step, network.model.state_dict(), state)
    engine.barrier()


def _resume(
    part: str, network: Network, optimiser: torch.optim.Optimizer, averaged: ModelEmaV3 | None, sums: dict[str, Tensor],
    checkpoints: Checkpoints, record: Recorder,
) -> int:  # fmt: skip
    """Puts everything back as the newest whole checkpoint has it. Returns the steps done."""
    folder, faults = checkpoints.latest()
    for fault in faults:
        record.say(f"{part}: damaged checkpoint passed over: {fault}")
    step = 0
    if folder is not None:
        network.model.load_state_dict(read_weights(folder))
        state = read_state(folder)
        step = state["step"]
        optimiser.load_state_dict(state["optimiser"])
        if averaged is not None:
            averaged.module.model.load_state_dict(state["ema"])
        sums.update(state["sums"])
        record.say(f"{part}: going on from step {step}")
    record.rewind(part, step)
    return step


def _mean_losses(sums: dict[str, Tensor], steps: int, part: str, step: int, engine: Engine) -> dict[str, float]:
    """The epoch's mean losses over all processes: the one place where training waits for the device."""
    means = engine.mean(torch.stack(list(sums.values())) / steps).tolist()
    losses = dict(zip(sums, means, strict=True))
    if not all(map(math.isfinite, means)):
        raise UserError(
            f"{part}: the loss is no longer finite at step {step}: {losses}; lower learning_rate or set clip"
        )
    return losses
