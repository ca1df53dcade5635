"""The training loop: the same for teachers, advised students and students alone."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.config.schema import RecipeConfig
from coadvise.data import draws
from coadvise.data.loader import TrainingLoader
from coadvise.data.quarantine import Quarantine
from coadvise.data.views import Batch, Views
from coadvise.errors import Interrupted, UserError
from coadvise.models.network import Network
from coadvise.training.checkpoint import Checkpoints, Schedule, TrainingState
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder
from coadvise.training.nonfinite import NonFiniteGuard
from coadvise.training.optim import all_but_new, average_of, clip_gradient, learning_rate, make_optimiser

Advisers = Callable[[Batch], Mapping[str, Tensor]]  # logits [B, K] by teacher: `Teachers`, or `StoredLogits`
Losses = Callable[[nn.Module, Batch, Mapping[str, Tensor]], Mapping[str, Tensor]]  # of a network, a batch, its advice
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]  # top-1 by output head, of a network after so many steps
Progress = Callable[[str, int, int, Mapping[str, float]], None]  # part, steps done, steps in all, latest figures


@dataclass(frozen=True)
class Training:
    """One network to train.

    Attributes:
        part: its name in the record and its folder in the run directory, such as "students/advised-0".
        seed: decides its views and its dropout; the initial weights are those of `network`.
        teachers: logits by name for a batch, from teachers on the engine's device or from a cache; an empty dict for
            a teacher or a student alone.
        losses: "total", which is minimised, and its terms by name for the record.
        evaluate: scores the network on the validation images, `recipe.evaluations` times.
        checkpoint_seconds: least time between checkpoints; 0 saves after each epoch. See `Schedule`.
        max_unreadable: the share of the training images that may be unreadable.
    """

    part: str
    seed: int
    network: Network
    recipe: RecipeConfig
    views: Views
    teachers: Advisers
    losses: Losses
    evaluate: Evaluate
    workers: int
    checkpoint_seconds: float
    max_unreadable: float = 0.0


def train(job: Training, checkpoints: Checkpoints, engine: Engine, record: Recorder, progress: Progress) -> Network:
    """Trains a network to its end, from its last checkpoint if there is one.

    Returns:
        The network, with averaged weights if the recipe has EMA.

    Raises:
        Interrupted: a signal asked for a stop; the current step is saved.
        UserError: the loss stays non-finite, too many training images cannot be read, or the checkpoint does not fit
            the configuration.
        StorageError: a checkpoint or the record cannot be written.
    """
    recipe, network = job.recipe, job.network
    engine.prepare(network)  # before the optimiser and the average, which are made where the weights are
    loader = TrainingLoader(
        job.views, recipe.batch_size, recipe.accumulate, job.workers, engine.rank, engine.processes, pin=engine.pins
    )
    per_epoch, last_step = loader.steps_per_epoch, recipe.epochs * loader.steps_per_epoch
    optimiser, averaged = make_optimiser(network.model, recipe), average_of(network, recipe)
    frozen_at_first = all_but_new(network.model) if recipe.head_epochs else []
    guard = NonFiniteGuard(job.part, network, optimiser, engine, record)
    state = TrainingState(network, optimiser, averaged, guard)
    first_step = state.restore(job.part, checkpoints, record.say)
    record.rewind(job.part, first_step)
    if first_step >= last_step:
        raise UserError(f"{job.part} is at step {first_step}, and would end at {last_step}; give it more epochs")
    result = averaged.module if averaged else network
    quarantine = Quarantine(record.path.parent, job.views.split, job.max_unreadable)
    evaluate_after = {math.ceil(recipe.epochs * (n + 1) / recipe.evaluations) for n in range(recipe.evaluations)}
    model, optimiser = engine.setup(network, optimiser)
    schedule, began = Schedule(job.checkpoint_seconds), time.monotonic()
    network.train()

    for step, micro_batches in enumerate(loader.steps(first_step, last_step), first_step + 1):
        engine.at = f"step {step} of {job.part}"
        rate = learning_rate(step - 1, per_epoch, recipe)
        for group in optimiser.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        torch.manual_seed(draws.scalar_seed(job.seed, draws.STEP, step - 1, engine.rank))  # dropout, stochastic depth

        # Forward and backward: gradients add up over micro-batches.
        for number, micro_batch in enumerate(micro_batches, 1):
            for line in quarantine.add(micro_batch.unreadable):
                record.say(f"{job.part}: a training image is skipped from now on: {line}")
            batch = engine.place(micro_batch)
            with engine.accumulating(model, number < len(micro_batches)):
                with engine.autocast():
                    advice = job.teachers(batch)
                losses = job.losses(model, batch, advice)
                engine.backward(losses["total"] / len(micro_batches))
            guard.observe(advice, losses, len(micro_batches))

        if step <= recipe.head_epochs * per_epoch:
            for parameter in frozen_at_first:  # without a gradient the optimiser leaves it as it is
                parameter.grad = None

        # Update, unless the guard makes the optimiser skip it.
        guard.decide(step, clip_gradient(network, recipe.clip))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if averaged is not None:
            averaged.update(network, step - 1)

        # After an epoch: record its losses, and evaluate if it is time.
        figures: dict[str, float] = {}
        epoch, within = divmod(step, per_epoch)
        if within == 0:
            speed = round((step - first_step) * loader.batch_size / (time.monotonic() - began), 1)
            figures = guard.mean_losses(per_epoch, step)
            where = {"part": job.part, "seed": job.seed, "step": step, "epoch": epoch}
            record.add(
                "train", **where, learning_rate=rate, losses=dict(figures), images_per_second=speed,
                unreadable=quarantine.count(),
            )  # fmt: skip
            if epoch in evaluate_after:
                top1 = job.evaluate(result, step)
                record.add("eval", **where, top1=top1)
                figures["top1"] = top1[CLASS]
        progress(job.part, step, last_step, figures)

        # Save if it is time, or if a process was asked to stop; all of them save the same step.
        stop, due = engine.any_rank(engine.stop_requested, schedule.due(within == 0))
        if step < last_step and (stop or due):
            _save(state, step, stop, checkpoints, schedule, engine)
        if step < last_step and stop:
            raise Interrupted(f"stopped at step {step} of {last_step} of {job.part}")

    return result.eval()


def _save(
    state: TrainingState, step: int, stop: bool, checkpoints: Checkpoints, schedule: Schedule, engine: Engine
) -> None:
    """Writes a checkpoint, and waits until it is written. While steps are skipped, only a stop is saved."""
    began = time.monotonic()
    state.guard.report()
    if state.guard.in_a_row and not stop:
        return
    if engine.is_main:
        state.save(step, checkpoints)
    engine.barrier()
    schedule.saved(time.monotonic() - began)
