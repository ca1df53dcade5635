"""Checkpoints of one network's training: what they hold, when they are due, and which are kept."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from coadvise.config.schema import RecipeConfig
from coadvise.errors import UserError
from coadvise.models.network import Network
from coadvise.storage import DamagedError, read_manifest, read_state, read_weights, storing, write_folder
from coadvise.training.nonfinite import NonFiniteGuard

KEEP = 2  # checkpoints of a network; there is a third while it is written
WRITING_SHARE = 50  # the time between checkpoints is at least this many times as long as writing one takes


class Checkpoints:
    """A folder of checkpoints by step. The newest two are kept; damaged ones are skipped."""

    def __init__(self, folder: Path, keep: int = KEEP) -> None:
        self.folder, self.keep = folder, keep
        self.damaged: list[Path] = []

    def save(self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes the checkpoint after `step` optimiser steps, then removes older ones."""
        new = self.folder / f"step-{step:08d}"
        with storing(new):
            self.folder.parent.mkdir(exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            write_folder(new, weights, state, {"step": step, "torch": torch.__version__})
            for other in self.damaged:  # a damaged checkpoint must not be kept in place of a whole one
                if other != new:
                    shutil.rmtree(other, ignore_errors=True)
            self.damaged.clear()
            for old in self._all()[: -self.keep]:
                shutil.rmtree(old)

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and what is wrong with newer ones."""
        faults: list[str] = []
        self.damaged.clear()
        for folder in reversed(self._all()):
            try:
                read_manifest(folder)
                return folder, faults
            except DamagedError as error:
                faults.append(str(error))
                self.damaged.append(folder)
        return None, faults

    def remove(self) -> None:
        """Removes all of them, once the finished network is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        for old in self.folder.glob(".*.old"):  # killed between the two renames that replace a folder
            whole = old.with_name(old.name[1 : -len(".old")])
            if not whole.exists():
                old.rename(whole)
        for stale in (*self.folder.glob(".*.part"), *self.folder.glob(".*.old")):
            shutil.rmtree(stale, ignore_errors=True)
        return sorted(self.folder.glob("step-*"))


class Schedule:
    """When the next checkpoint is due.

    Args:
        seconds: at least this long between checkpoints; 0 makes one due after each epoch, and at no other time.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._next = seconds, time.monotonic() + seconds

    def due(self, epoch_ended: bool) -> bool:
        return time.monotonic() >= self._next if self.seconds else epoch_ended

    def saved(self, took: float) -> None:
        """Counts from now; `took` is how many seconds the checkpoint took."""
        self._next = time.monotonic() + max(self.seconds, WRITING_SHARE * took)


@dataclass(frozen=True)
class TrainingState:
    """Everything that training changes, so that it can go on bit for bit from any step."""

    network: Network
    optimiser: torch.optim.Optimizer
    averaged: ModelEmaV3 | None
    guard: NonFiniteGuard

    def save(self, step: int, checkpoints: Checkpoints) -> None:
        ema = self.averaged.module.model.state_dict() if self.averaged else None
        state = {"step": step, "optimiser": self.optimiser.state_dict(), "ema": ema, **self.guard.state_dict()}
        checkpoints.save(step, self.network.model.state_dict(), state)

    def restore(self, part: str, checkpoints: Checkpoints, say: Callable[[str], None]) -> int:
        """Loads the newest whole checkpoint of the network called `part`. Returns the steps done, 0 without one.

        Raises:
            UserError: the checkpoint holds another network's state, or something else than a training state.
        """
        folder, faults = checkpoints.latest()
        for fault in faults:
            say(f"{part}: damaged checkpoint skipped: {fault}")
        if folder is None:
            return 0
        try:
            weights, state = read_weights(folder), read_state(folder)
            step = int(state["step"])
            self.network.model.load_state_dict(weights)
            keys = ("betas", "weight_decay", "lr_scale")
            asked = [{key: group[key] for key in keys if key in group} for group in self.optimiser.param_groups]
            self.optimiser.load_state_dict(state["optimiser"])
            for group, values in zip(self.optimiser.param_groups, asked, strict=True):
                group.update(values)  # a changed configuration holds from here on
            if self.averaged is not None:
                self.averaged.module.model.load_state_dict(state["ema"] or weights)
            self.guard.load_state_dict(state)
        except DamagedError as error:  # its checksums are right, so it was written like this
            raise UserError(f"{part}: {error}; remove '{folder}' to go on without it") from None
        except (RuntimeError, ValueError, LookupError, AttributeError, TypeError):
            raise UserError(
                f"{part}: '{folder}' belongs to another network; undo that change, or choose another --out"
            ) from None
        say(f"{part}: going on from step {step}")
        return step


def checkpoint_bytes(network: Network, recipe: RecipeConfig) -> int:
    """The size of a checkpoint: weights, AdamW's two averages of each gradient, averaged weights."""
    weights = sum(value.numel() * value.element_size() for value in network.model.state_dict().values())
    averages = sum(2 * p.numel() * p.element_size() for p in network.model.parameters() if p.requires_grad)
    return weights * (2 if recipe.ema else 1) + averages
