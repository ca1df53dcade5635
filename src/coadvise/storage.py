"""Files and folders that are written whole or not at all, and verified by checksum when they are read.

They are written under another name beside their place, synced to the disk, and renamed. A folder of weights, such as a
checkpoint or a finished network, has a manifest with the size and sha256 of each file and a checksum of its own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """The files of a folder are not what its manifest says; the message names the file and the fault."""


def write_folder(
    folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any] | None, about: Mapping[str, Any]
) -> None:
    """Writes or replaces a folder of weights, an optional training state and a manifest.

    Args:
        weights: tensors for `model.safetensors`.
        state: tensors and primitives only, for `state.pt`; None leaves it out.
        about: what else the manifest says (JSON).

    Raises:
        StorageError: the disk is full, or the parent folder is gone or read-only. No partial files are left.
    """
    with replacing_folder(folder) as beside:
        _write_files(beside, weights, state, about)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` once the block has filled it. As `write_folder` for errors."""
    beside = folder.with_name(f".{folder.name}.part")
    with storing(folder, beside):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()  # without its parents: a run directory that is gone must not come back without its record
        yield beside
        fsync(beside)
        if folder.exists():  # damaged or older
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            beside.rename(folder)
            shutil.rmtree(old)
        else:
            beside.rename(folder)
        fsync(folder.parent)


def _write_files(
    beside: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any] | None, about: Mapping[str, Any]
) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, beside / WEIGHTS)
    names = [WEIGHTS]
    if state is not None:
        with (beside / STATE).open("wb") as file:
            try:
                torch.save(dict(state), file)
            except RuntimeError as error:  # PyTorch's message hides the operating system's, which says why
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        names.append(STATE)
    files = {name: {"bytes": (beside / name).stat().st_size, "sha256": _sha256(beside / name)} for name in names}
    (beside / MANIFEST).write_text(_sealed(about, files))
    for name in (*names, MANIFEST):
        (beside / name).chmod(0o644)  # safetensors leaves 0600
        fsync(beside / name)


def _sealed(about: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    manifest = json.loads(json.dumps({**about, "format": FORMAT, "files": files}))
    return json.dumps({**manifest, OWN: _digest(manifest)}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a folder's manifest and verifies every file.

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
    if digest != (None if version == 1 else _digest(manifest)):  # before the format, which may be what changed
        raise DamagedError(f"{folder / MANIFEST}: its contents changed (sha256 differs)")
    if version not in (1, FORMAT):
        raise UserError(
            f"'{folder}' has format {version!r}, this version of coadvise reads 1 and {FORMAT}; use the version that "
            "wrote it, or choose another --out"
        )
    if WEIGHTS not in files:
        raise DamagedError(f"{folder / MANIFEST}: lists no {WEIGHTS}")
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
    """The training state of a folder whose manifest has been read.

    Raises:
        DamagedError: it holds anything but tensors and primitives. Nothing else is unpickled.
    """
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; PyTorch's message advises to unpickle code
        fault = type(error).__name__
        raise DamagedError(f"{folder / STATE}: refused, holds more than tensors and plain values ({fault})") from None
    if not isinstance(state, dict):
        raise DamagedError(f"{folder / STATE}: holds {type(state).__name__}, not a training state")
    return state


def write_model(folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes a finished network: its weights, and in the manifest all that is needed to build it again."""
    with storing(folder):
        folder.parent.mkdir(exist_ok=True)
        write_folder(folder, weights, None, about)


def describe_model(folder: Path, about: Mapping[str, Any]) -> None:
    """Replaces what the manifest of a finished network says about it; the weights stay. Raises as `read_manifest`."""
    write_text(folder / MANIFEST, _sealed(about, read_manifest(folder)["files"]))


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `write_model` wrote: (manifest, weights). Raises UserError for a missing or damaged model."""
    if not (folder / MANIFEST).is_file():
        what = f"no {MANIFEST}" if folder.is_dir() else "not a folder"
        raise UserError(f"no model in '{folder}' ({what}); give the folder of a finished network")
    try:
        return read_manifest(folder), read_weights(folder)
    except DamagedError as error:
        raise UserError(
            f"damaged model: {error}; restore the file, or delete '{folder}' and run the same 'coadvise fit' again"
        ) from None


def contents(path: Path) -> str:
    """Checksums of the weights in a network's folder or a file, to compare with others; the path if it has none."""
    try:
        if path.is_file():
            return _sha256(path)
        return json.dumps(read_manifest(path)["files"], sort_keys=True)
    except (OSError, DamagedError, UserError):  # reported where the weights are needed
        return str(path)


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes or replaces a safetensors file."""
    with _replacing(path) as beside:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, beside, dict(metadata))
        beside.chmod(0o644)  # safetensors leaves 0600


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a text file."""
    write_bytes(path, text.encode())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes or replaces a text file, line by line."""
    with _replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes or replaces a file."""
    with _replacing(path) as beside:
        beside.write_bytes(content)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives the name to write to, and puts what was written there in the place of `path`."""
    beside = path.with_name(f".{path.name}.part")
    with storing(path, beside):
        yield beside
        fsync(beside)
        beside.rename(path)
        fsync(path.parent)


_checks: list[Callable[[], None]] = []  # of this process


@contextmanager
def writing_only_while(check: Callable[[], None]) -> Iterator[None]:
    """Inside, `check` is called before anything is written. It raises StorageError if this process may not any more."""
    _checks.append(check)
    try:
        yield
    finally:
        _checks.remove(check)


def is_supervised() -> bool:
    """Whether something else than locks of files says who may write, see `writing_only_while`."""
    return bool(_checks)


@contextmanager
def storing(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Turns an error of writing `path` into one message, and removes the partial file or folder `beside`.

    Raises:
        StorageError: in place of the errors of the operating system and safetensors.
    """
    for check in _checks:
        check()
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


def fsync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_text(size: float) -> str:
    """As "1.2 GB", by powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:,.{0 if unit == 'B' or size >= 99.5 else 1}f} {unit}"
        size /= 1000
    raise AssertionError
