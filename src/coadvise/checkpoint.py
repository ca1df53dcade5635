"""Checkpoints and finished models: written beside, fsynced, renamed; found by manifest, verified by checksum."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coadvise.errors import UserError

FORMAT = 1
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"


class DamagedError(Exception):
    """A checkpoint or model folder whose files are not what its manifest says; `str` names the file and the fault."""


def write_folder(
    folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any] | None, about: Mapping[str, Any]
) -> None:
    """Writes weights, optional training state and a manifest as one folder that is there whole or not at all.

    Args:
        weights: tensors for `model.safetensors`.
        state: tensors and primitives only, for `state.pt`; None leaves it out.
        about: what else the manifest says (JSON).
    """
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, beside / WEIGHTS)
    names = [WEIGHTS]
    if state is not None:
        torch.save(dict(state), beside / STATE)
        names.append(STATE)
    files = {name: {"bytes": (beside / name).stat().st_size, "sha256": _sha256(beside / name)} for name in names}
    text = json.dumps({"format": FORMAT, **about, "files": files}, indent=1)
    (beside / MANIFEST).write_text(text)
    for name in (*names, MANIFEST):
        (beside / name).chmod(0o644)  # safetensors leaves 0600
        _fsync(beside / name)
    _fsync(beside)
    if folder.exists():  # a damaged or older one of the same name
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old)
    else:
        beside.rename(folder)
    _fsync(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a folder's manifest and holds every file against it.

    Raises:
        DamagedError: a missing, truncated or changed file, or a format this version does not know.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / MANIFEST}: {error or type(error).__name__}") from None
    if manifest.get("format") != FORMAT:
        raise DamagedError(f"{folder / MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}")
    for name, (size, digest) in files.items():
        path = folder / name
        if name not in (WEIGHTS, STATE) or not path.is_file():
            raise DamagedError(f"{path}: missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{path}: {path.stat().st_size} bytes, should be {size}")
        if _sha256(path) != digest:
            raise DamagedError(f"{path}: its contents changed (sha256 differs)")
    return manifest


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder whose manifest has been read. Raises DamagedError."""
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{folder / WEIGHTS}: {error}") from None


def read_state(folder: Path) -> dict[str, Any]:
    """The training state of a folder whose manifest has been read; unpickles no code."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


class Checkpoints:
    """The checkpoints of one network's training, newest last; the newest two are kept."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes the checkpoint of `step` optimiser steps, then drops what is too old."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_folder(self.folder / f"step-{step:08d}", weights, state, {"step": step, "torch": torch.__version__})
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and the faults of newer ones that are not."""
        faults: list[str] = []
        for folder in reversed(self._all()):
            try:
                read_manifest(folder)
                return folder, faults
            except DamagedError as error:
                faults.append(str(error))
        return None, faults

    def remove(self) -> None:
        """Once the model itself is written, nothing needs them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        for stale in (*self.folder.glob(".*.part"), *self.folder.glob(".*.old")):
            shutil.rmtree(stale, ignore_errors=True)
        return sorted(self.folder.glob("step-*"))


def write_model(folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes a finished network: its weights, and in the manifest all that is needed to build it again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, weights, None, about)


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `write_model` wrote: (manifest, weights).

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"no model in '{folder}' (no {MANIFEST}); give the folder of a finished network")
    try:
        return read_manifest(folder), read_weights(folder)
    except DamagedError as error:
        raise UserError(f"damaged model: {error}; train it again or restore the file") from None


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replaces a safetensors file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, beside, dict(metadata))
    beside.chmod(0o644)  # safetensors leaves 0600
    _fsync(beside)
    beside.rename(path)
    _fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text)
        _fsync(beside)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)  # where the disk is full
    _fsync(path.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
