"""A network's checkpoints while it trains: the newest whole ones are kept, damaged ones are passed over."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coadvise.storage import STATE, DamagedError, read_manifest, storing, write_folder

KEEP = 2  # checkpoints of a network; a third is there while it is written


class Checkpoints:
    """The checkpoints of one network's training, newest last; the newest two are kept."""

    def __init__(self, folder: Path, keep: int = KEEP) -> None:
        self.folder, self.keep = folder, keep
        self.damaged: list[Path] = []

    def save(self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes the checkpoint of `step` optimiser steps, then drops what is too old."""
        new = self.folder / f"step-{step:08d}"
        with storing(new):
            self.folder.parent.mkdir(exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            write_folder(new, weights, state, {"step": step, "torch": torch.__version__})
            for other in self.damaged:  # they count for nothing: a whole one must not be dropped in their place
                if other != new:
                    shutil.rmtree(other, ignore_errors=True)
            self.damaged.clear()
            for old in self._all()[: -self.keep]:
                shutil.rmtree(old)

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and the faults of newer ones that are not."""
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
        """Once the model itself is written, nothing needs them."""
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


def read_state(folder: Path) -> dict[str, Any]:
    """The training state of a folder whose manifest has been read.

    Raises:
        DamagedError: it is not what `torch.save` makes of tensors and primitives. Nothing else is unpickled.
    """
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError and others; the text advises to unpickle code
        fault = type(error).__name__
        raise DamagedError(f"{folder / STATE}: refused, it is not tensors and plain values alone ({fault})") from None
    if not isinstance(state, dict):
        raise DamagedError(f"{folder / STATE}: holds {type(state).__name__}, not a training state")
    return state
