"""Checkpoints and finished models: written beside, fsynced, renamed; found by manifest, verified by checksum."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coadvise.errors import StorageError, UserError

FORMAT = 2  # 1 had no checksum of the manifest itself, and is still read
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
OWN = "manifest_sha256"  # the manifest's key for the checksum of all its other keys


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

    Raises:
        StorageError: the disk is full, or the folder's own folder is gone or read-only. Nothing half-written is left.
    """
    beside = folder.with_name(f".{folder.name}.part")
    with storing(folder, beside):
        _write(beside, weights, state, about)
        if folder.exists():  # a damaged or older one of the same name
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            beside.rename(folder)
            shutil.rmtree(old)
        else:
            beside.rename(folder)
        fsync(folder.parent)


def _write(
    beside: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any] | None, about: Mapping[str, Any]
) -> None:
    """Writes and fsyncs a folder's files under the name that says it is not finished."""
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()  # not its parents: a run directory that has gone is not to be made again without its record
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, beside / WEIGHTS)
    names = [WEIGHTS]
    if state is not None:
        with (beside / STATE).open("wb") as file:
            try:
                torch.save(dict(state), file)
            except RuntimeError as error:  # PyTorch's own words cover those of the file, which say why
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        names.append(STATE)
    files = {name: {"bytes": (beside / name).stat().st_size, "sha256": _sha256(beside / name)} for name in names}
    manifest = json.loads(json.dumps({**about, "format": FORMAT, "files": files}))
    (beside / MANIFEST).write_text(json.dumps({**manifest, OWN: _digest(manifest)}, indent=1))
    for name in (*names, MANIFEST):
        (beside / name).chmod(0o644)  # safetensors leaves 0600
        fsync(beside / name)
    fsync(beside)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a folder's manifest and holds every file against it.

    Raises:
        DamagedError: a missing, truncated or changed file.
        UserError: a format this version does not know.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{folder / MANIFEST}: {error or type(error).__name__}") from None
    digest, version = manifest.pop(OWN, None), manifest.get("format")
    if digest != (None if version == 1 else _digest(manifest)):  # whatever the format: a changed number too
        raise DamagedError(f"{folder / MANIFEST}: its contents changed (sha256 differs)")
    if version not in (1, FORMAT):
        raise UserError(
            f"'{folder}' is of format {version!r}, this version of coadvise reads 1 and {FORMAT}; go on with the "
            "version that wrote it, or choose another --out"
        )
    if WEIGHTS not in files:
        raise DamagedError(f"{folder / MANIFEST}: names no {WEIGHTS}")
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


def write_model(folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes a finished network: its weights, and in the manifest all that is needed to build it again."""
    with storing(folder):
        folder.parent.mkdir(exist_ok=True)
        write_folder(folder, weights, None, about)


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `write_model` wrote: (manifest, weights).

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        what = f"no {MANIFEST}" if folder.is_dir() else "it is no folder"
        raise UserError(f"no model in '{folder}' ({what}); give the folder of a finished network")
    try:
        return read_manifest(folder), read_weights(folder)
    except DamagedError as error:
        raise UserError(
            f"damaged model: {error}; restore the file, or delete '{folder}' and run the same 'coadvise fit' again"
        ) from None


def contents(path: Path) -> str:
    """What tells given weights from others: their checksums, of a network's folder or of a file; else the path."""
    try:
        if path.is_file():
            return _sha256(path)
        return json.dumps(read_manifest(path)["files"], sort_keys=True)
    except (OSError, DamagedError, UserError):  # said where it is to be read
        return str(path)


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replaces a safetensors file whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    with storing(path, beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, beside, dict(metadata)
        )
        beside.chmod(0o644)  # safetensors leaves 0600
        fsync(beside)
        beside.rename(path)
        fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    with storing(path, beside):
        beside.write_bytes(content)
        fsync(beside)
        beside.rename(path)
        fsync(path.parent)


@contextmanager
def storing(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Says in a sentence why something cannot be written, and removes the part of it that was.

    Raises:
        StorageError: instead of what the operating system and safetensors raise.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
            with suppress(OSError):
                beside.unlink()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageError(
            f"cannot write '{path}': {reason}; what was saved before is whole: make room for it or make it writable, "
            "and run the same command again"
        ) from error


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
