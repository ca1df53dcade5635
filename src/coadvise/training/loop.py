"""The training loop: one for teachers (nobody advises them), advised students, and students alone."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.config import RecipeConfig
from coadvise.data import draws
from coadvise.data.loader import TrainingLoader
from coadvise.data.quarantine import Quarantine
from coadvise.data.views import Batch, Views
from coadvise.errors import Interrupted, UserError
from coadvise.models.network import Network
from coadvise.storage import DamagedError, read_weights
from coadvise.training.checkpoint import Checkpoints, read_state
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder
from coadvise.training.nonfinite import Watch
from coadvise.training.optim import average_of, learning_rate, make_optimiser

Advisers = Callable[[Batch], Mapping[str, Tensor]]  # logits by teacher: `Teachers`, or `StoredLogits` of a cache
Losses = Callable[[nn.Module, Batch, Mapping[str, Tensor]], Mapping[str, Tensor]]  # network, batch, advice
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]  # top-1 by answer, of a network after so many steps
Progress = Callable[[str, int, int, Mapping[str, float]], None]  # part, steps done, steps in all, latest figures


@dataclass(frozen=True)
class Training:
    """One network to train.

    Attributes:
        part: its name in the record and its folder in the run directory, such as "students/advised-0".
        seed: decides its views and its dropout; its initial weights came with `network`.
        teachers: logits by name for a batch, from teachers on the engine's device or from a cache; an empty dict for
            a teacher or a student alone.
        losses: "total", which is minimised, and its parts by name for the record.
        evaluate: scores the network on the validation images, `recipe.evaluations` times.
        checkpoint_seconds: at least this long between checkpoints; they are written at the end of an epoch. Slow ones
            come less often, see `seconds_between`.
        max_unreadable: the share of the training files that may be, or become, unreadable.
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
    """Trains a network from its last checkpoint, or from the start, to its end.

    Returns:
        The network with the weights it answers with: averaged ones where the recipe has EMA.

    Raises:
        Interrupted: a signal asked for a stop; the step at hand is saved.
        UserError: what is no longer finite stays so; too many training files can no longer be read; or the checkpoint
            is a stranger's, or does not fit a configuration that was changed.
        StorageError: a checkpoint or the record cannot be written.
    """
    recipe, network = job.recipe, job.network
    engine.prepare(network)  # first: optimiser and average follow the weights
    loader = TrainingLoader(
        job.views, recipe.batch_size, recipe.accumulate, job.workers, engine.rank, engine.processes, pin=engine.pins
    )
    per_epoch, last_step = loader.steps_per_epoch, recipe.epochs * loader.steps_per_epoch
    optimiser = make_optimiser(network.model, recipe)
    averaged = average_of(network, recipe)
    answering = averaged.module if averaged else network
    quarantine = Quarantine(record.path.parent, job.views.split, job.max_unreadable)
    watch = Watch(job.part, network, optimiser, engine, record)
    first_step = _resume(job.part, network, optimiser, averaged, watch, checkpoints, record)
    if first_step >= last_step:
        raise UserError(f"{job.part} is at step {first_step}, and would end at {last_step}; give it more epochs")
    model, optimiser = engine.setup(network, optimiser)
    evaluate_after = {math.ceil(recipe.epochs * (n + 1) / recipe.evaluations) for n in range(recipe.evaluations)}
    began = time.monotonic()
    next_save = began + job.checkpoint_seconds
    network.train()

    for step, micro_batches in enumerate(loader.steps(first_step, last_step), first_step):
        engine.at = f"step {step + 1} of {job.part}"
        rate = learning_rate(step, per_epoch, recipe)
        for group in optimiser.param_groups:
            group["lr"] = rate
        torch.manual_seed(draws.scalar_seed(job.seed, draws.STEP, step, engine.rank))  # dropout, stochastic depth

        for number, micro_batch in enumerate(micro_batches, 1):
            for line in quarantine.add(micro_batch.unreadable):
                record.say(f"{job.part}: a training image is skipped from now on: {line}")
            batch = engine.place(micro_batch)
            with engine.accumulating(model, number < len(micro_batches)):
                with engine.autocast():
                    advice = job.teachers(batch)
                losses = job.losses(model, batch, advice)
                engine.backward(losses["total"] / len(micro_batches))
            watch.see(advice, losses, len(micro_batches))

        watch.judge(step + 1, _clip(network, recipe.clip))
        optimiser.step()  # unless the watch forbids it
        optimiser.zero_grad(set_to_none=True)
        if averaged is not None:
            averaged.update(network, step)

        figures: dict[str, float] = {}
        epoch, within = divmod(step + 1, per_epoch)
        if within == 0:
            speed = round((step + 1 - first_step) * loader.batch_size / (time.monotonic() - began), 1)
            figures = watch.mean_losses(per_epoch, step + 1)
            where = {"part": job.part, "seed": job.seed, "step": step + 1, "epoch": epoch}
            record.add(
                "train", **where, learning_rate=rate, losses=dict(figures), images_per_second=speed,
                unreadable=quarantine.count(),
            )  # fmt: skip
            if epoch in evaluate_after:
                scores = job.evaluate(answering, step + 1)
                record.add("eval", **where, top1=scores)
                figures["top1"] = scores[CLASS]
        progress(job.part, step + 1, last_step, figures)

        stop = engine.stop_requested and step + 1 < last_step
        due = within == 0 and step + 1 < last_step and not watch.in_a_row  # while steps are skipped, keep what there is
        if stop or (due and engine.agreed(time.monotonic() >= next_save)):
            took = _save(step + 1, network, optimiser, averaged, watch, checkpoints, engine)
            next_save = time.monotonic() + seconds_between(job.checkpoint_seconds, took)
        if stop:
            raise Interrupted(f"stopped at step {step + 1} of {last_step} of {job.part}")

    return answering.eval()


def _save(
    step: int, network: Network, optimiser: torch.optim.Optimizer, averaged: ModelEmaV3 | None, watch: Watch,
    checkpoints: Checkpoints, engine: Engine,
) -> float:  # fmt: skip
    """Writes a checkpoint. Returns the seconds it took."""
    began = time.monotonic()
    watch.read()
    if engine.is_main:
        ema = averaged.module.model.state_dict() if averaged else None
        state = {"step": step, "optimiser": optimiser.state_dict(), "ema": ema, **watch.state()}
        checkpoints.save(step, network.model.state_dict(), state)
    engine.barrier()
    return time.monotonic() - began


def seconds_between(least: float, took: float) -> float:
    """How long after a checkpoint that took `took` seconds the next is due: they are to take under 2 % of the time."""
    return max(least, 50 * took) if least else 0.0


def _resume(
    part: str, network: Network, optimiser: torch.optim.Optimizer, averaged: ModelEmaV3 | None, watch: Watch,
    checkpoints: Checkpoints, record: Recorder,
) -> int:  # fmt: skip
    """Puts everything back as the newest whole checkpoint has it. Returns the steps done."""
    folder, faults = checkpoints.latest()
    for fault in faults:
        record.say(f"{part}: damaged checkpoint passed over: {fault}")
    step = 0
    if folder is not None:
        try:
            weights, state = read_weights(folder), read_state(folder)
            step = int(state["step"])
            network.model.load_state_dict(weights)
            asked = [{key: group[key] for key in ("betas", "weight_decay")} for group in optimiser.param_groups]
            optimiser.load_state_dict(state["optimiser"])
            for group, values in zip(optimiser.param_groups, asked, strict=True):
                group.update(values)  # a configuration that was changed holds from here on
            if averaged is not None:
                averaged.module.model.load_state_dict(state["ema"] or weights)
            watch.load_state(state)
        except DamagedError as error:  # its checksums hold, so it was made like this
            raise UserError(f"{part}: {error}; remove '{folder}' to go on without it") from None
        except (RuntimeError, ValueError, LookupError, AttributeError, TypeError):
            raise UserError(
                f"{part}: '{folder}' is of another network; undo that change, or choose another --out"
            ) from None
        record.say(f"{part}: going on from step {step}")
    record.rewind(part, step)
    return step


def checkpoint_bytes(network: Network, recipe: RecipeConfig) -> int:
    """How large a checkpoint of a network is: its weights, AdamW's two averages of each gradient, averaged weights."""
    weights = sum(value.numel() * value.element_size() for value in network.model.state_dict().values())
    averages = sum(2 * p.numel() * p.element_size() for p in network.model.parameters() if p.requires_grad)
    return weights * (2 if recipe.ema else 1) + averages


def _clip(network: Network, largest: float) -> Tensor:
    """The norm of the gradient, which is scaled down to `largest` where that is not 0."""
    if largest:
        return torch.nn.utils.clip_grad_norm_(network.parameters(), largest)
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
