"""Teachers' logits for training views, stored once and read by every later run with the same views.

A view is a pure function of (seed, epoch, image), and each image occurs once in an epoch, so only logits are stored. A
cache has a folder per seed, and in it a file (a shard) per epoch with a row per image. What the logits depend on is
written beside them, and a cache of anything else is refused.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load, save
from torch import Tensor

from coadvise.config.reading import changes
from coadvise.config.schema import RunConfig, plain_size
from coadvise.data.device_views import DEVICE_VIEWS
from coadvise.data.images import LARGE, REDUCED
from coadvise.data.scanned import Dataset
from coadvise.data.views import VIEWS, Batch
from coadvise.errors import UserError
from coadvise.machine import lock
from coadvise.storage import read_model, storing, write_text

FORMAT = 1
HALF = torch.finfo(torch.float16).max
COARSE = 64.0  # float16 keeps smaller logits to within 1/64
CACHE, LOCK = "cache.json", ".lock"
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Form:
    """How one image's logits are stored: all in float16; or, if that is larger, the largest `top_k`.

    In the second form the other classes share one logit, which keeps the sum of their probabilities (τ = 1).
    """

    classes: int
    top_k: int

    @property
    def dense(self) -> bool:
        return 2 * self.classes <= self._bytes_of_top

    @property
    def bytes_an_answer(self) -> int:
        return 2 * self.classes if self.dense else self._bytes_of_top

    @property
    def _bytes_of_top(self) -> int:
        return self.top_k * (2 + self._class_type.itemsize) + 2

    @property
    def _class_type(self) -> "np.dtype[Any]":
        return np.dtype(np.uint16 if self.classes <= 2**16 else np.uint32)

    def __str__(self) -> str:
        return "float16" if self.dense else f"the {self.top_k} largest in float16"

    def pack(self, teacher: str, logits: Tensor) -> Arrays:
        """Logits [B, K] of one teacher as arrays to store, of B rows each. Raises UserError for infinite ones."""
        if not torch.isfinite(logits).all():
            raise UserError(
                f"teacher '{teacher}' has logits that are no numbers; train it again at a lower learning rate"
            )
        # Float16 rounds large numbers coarsely, to 2 at 3,000; the same probabilities have a largest logit of 0.
        below = (logits - logits.amax(1, keepdim=True)).clamp(min=-HALF)
        logits = torch.where(logits.abs().amax(1, keepdim=True) > COARSE, below, logits)
        if self.dense:
            return {teacher: logits.half().cpu().numpy()}
        values, classes = logits.topk(self.top_k)
        others = logits.scatter(1, classes, -math.inf).logsumexp(1) - math.log(self.classes - self.top_k)
        return {
            f"{teacher}.values": values.half().cpu().numpy(),
            f"{teacher}.classes": classes.cpu().numpy().astype(self._class_type),
            f"{teacher}.others": others.clamp(-HALF, HALF).half().cpu().numpy(),
        }

    def unpack(self, teacher: str, arrays: Mapping[str, npt.NDArray[Any]], rows: npt.NDArray[np.int64]) -> Tensor:
        """Some rows of what `pack` returned, as logits [B, K] in float32."""
        if self.dense:
            return torch.from_numpy(arrays[teacher][rows]).float()
        values, others = (torch.from_numpy(arrays[f"{teacher}.{name}"][rows]).float() for name in ("values", "others"))
        classes = torch.from_numpy(arrays[f"{teacher}.classes"][rows].astype(np.int64))
        return others[:, None].repeat(1, self.classes).scatter_(1, classes, values)


def form_of(config: RunConfig, classes: int) -> Form:
    assert config.cache is not None
    return Form(classes, config.cache.top_k)


def fingerprint(config: RunConfig, dataset: Dataset, teachers: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """Everything the stored logits depend on, as nested primitives.

    Label smoothing and recycling are left out: they change labels, or the number of epochs, but no view.

    Args:
        teachers: the folders of the trained teachers by name.
    """
    train, windows = dataset.train, dataset.train.split.windows()
    views = config.augment.model_dump(mode="json", exclude={"smoothing", "recycle"})
    libraries = ("pillow", "timm", "torch", "torchvision")  # that make views and logits
    return {
        "data": {
            "images": len(train),
            "files": train.sha256[:16],
            "labels": _digest(train.labels.tobytes()),
            "classes": _digest(json.dumps(dataset.classes).encode()),
        },
        "views": {
            **views,
            "image_size": plain_size(config.data.image_size),
            "presize": config.data.presize,
            **({"on_device": DEVICE_VIEWS} if config.data.views == "device" else {}),
            "seed": seed,
            **train.preprocessing,
            **({} if windows is None else {"window": windows[1], "shards": _digest(windows[0].tobytes())}),
            **({"reduced": REDUCED} if any(width * height >= LARGE for width, height in train.sizes) else {}),
        },
        "teachers": {name: teacher_fingerprint(folder) for name, folder in teachers.items()},
        "precision": config.engine.precision,
        "stored": str(form_of(config, len(dataset.classes))),
        "code": {"views": VIEWS, "coadvise": version("coadvise"), **{name: version(name) for name in libraries}},
    }


def teacher_fingerprint(folder: Path) -> dict[str, Any]:
    """Everything a trained teacher's logits depend on. Raises UserError if it is missing or damaged."""
    about, _ = read_model(folder)
    deciding = {name: about[name] for name in ("model", "model_kwargs", "mean", "std")}
    weights = about["files"]["model.safetensors"]["sha256"]
    return {**deciding, "classes": _digest(json.dumps(about["classes"]).encode()), "weights": weights[:16]}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class LogitCache:
    """The stored logits of one seed's views: a folder with `cache.json` and a shard per epoch.

    An epoch is stored when `cache.json` has its shard's size and sha256, and the shard exists. Any number of processes
    may read and write a cache.

    Args:
        folder: DIR/seed-S; need not exist.
        fingerprint: what the caller's logits depend on; the folder's must be equal.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def check(self, keys: Collection[str] | None = None) -> None:
        """Raises UserError if the folder holds anything else, and names what differs.

        Args:
            keys: the parts of the fingerprint to compare; None compares all.
        """
        if not (self.folder / CACHE).is_file():
            own = (LOCK, f".{CACHE}.part", CACHE)  # another process may be creating it now
            if self.folder.exists() and (
                not self.folder.is_dir() or any(path.name not in own for path in self.folder.iterdir())
            ):
                raise UserError(f"'{self.folder}' exists and is not a logit cache; choose another folder")
            return
        old = self._contents()["fingerprint"]
        compared = self.fingerprint.keys() if keys is None else keys
        different = changes({k: old.get(k) for k in compared}, {k: self.fingerprint[k] for k in compared})
        if different:
            raise UserError(
                f"the logit cache '{self.folder}' has other contents: {'; '.join(different[:6])}"
                + (f" and {len(different) - 6} more" if len(different) > 6 else "")
                + "; choose another folder, or delete this one to fill it again"
            )

    def create(self) -> None:
        """Creates the folder if it does not exist. Raises UserError as `check`, or if it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self.check()
                if not (self.folder / CACHE).is_file():
                    self._write({})
        except OSError as error:
            raise UserError(f"'{self.folder}' cannot be written: {error.strerror}; choose another folder") from None

    def reset(self) -> None:
        """Empties a cache of other contents: deletes its shards and `cache.json`, and no other file.

        Raises:
            UserError: the folder is not a logit cache.
        """
        if not (self.folder / CACHE).is_file():
            self.check()
            return
        self.sweep()
        with self._lock():
            if self._contents()["fingerprint"] == json.loads(json.dumps(self.fingerprint)):
                return
            for shard in self.folder.glob("epoch-*.safetensors"):
                shard.unlink()
            (self.folder / CACHE).unlink()  # last: without it a killed reset would leave a folder that is no cache

    def missing(self, epochs: int) -> list[int]:
        """Which of epochs 0..epochs-1 are not stored. Raises UserError for a shard of another size."""
        if not (self.folder / CACHE).is_file():
            return list(range(epochs))
        shards = self._contents()["shards"]
        missing = []
        for epoch in range(epochs):
            path = self.shard(epoch)
            if path.name not in shards or not path.is_file():
                missing.append(epoch)
            elif path.stat().st_size != shards[path.name]["bytes"]:
                raise _damaged(path, f"{path.stat().st_size} bytes, should be {shards[path.name]['bytes']}")
        return missing

    def read(self, epoch: int) -> Arrays:
        """An epoch's arrays by name. Raises UserError for a shard that is damaged in any bit."""
        path = self.shard(epoch)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _damaged(path, error.strerror) from None
        wanted = self._contents()["shards"].get(path.name, {})
        if len(data) != wanted.get("bytes"):
            raise _damaged(path, f"{len(data)} bytes, should be {wanted.get('bytes')}")
        if hashlib.sha256(data).hexdigest() != wanted["sha256"]:
            raise _damaged(path, "its contents changed (sha256 differs)")
        return load(data)

    @contextmanager
    def claim(self, epoch: int) -> Iterator[FileIO | None]:
        """The file to write an epoch to, or None if another process is writing it or has stored it.

        The file is locked, so a claim ends with its process. It is removed afterwards, unless `write` renamed it.
        """
        path = self._part(epoch)
        with storing(path):
            file = path.open("ab", buffering=0)
        with file:
            if not _locked(file, path):
                yield None
                return
            try:
                file.truncate(0)  # left by a process that was killed
                yield file if epoch in self.missing(epoch + 1) else None
            finally:
                path.unlink(missing_ok=True)

    def write(self, epoch: int, file: FileIO, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Stores an epoch in its claimed file. Raises StorageError if it cannot be written, UserError as `check`."""
        data = save(dict(arrays))
        with storing(self.shard(epoch)):
            rest = memoryview(data)
            while rest:  # a write may be partial
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
            with self._lock():  # listed before it exists: a shard is never without its sha256
                self.check()  # another process may have reset it
                entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                self._write({**self._contents()["shards"], self.shard(epoch).name: entry})
            self._part(epoch).rename(self.shard(epoch))

    def sweep(self) -> None:
        """Removes partial files of processes that were killed."""
        for path in self.folder.glob(".epoch-*.part"):
            with suppress(FileNotFoundError), path.open("ab", buffering=0) as file:
                if _locked(file, path):
                    path.unlink()

    def shard(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:05d}.safetensors"

    def _part(self, epoch: int) -> Path:
        return self.folder / f".epoch-{epoch:05d}.part"

    def _contents(self) -> dict[str, Any]:
        path = self.folder / CACHE
        try:
            contents = json.loads(path.read_text())
            known = contents["format"] == FORMAT
            if known and not (isinstance(contents["fingerprint"], dict) and _are_shards(contents["shards"])):
                raise ValueError("it does not describe a logit cache")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"'{path}' cannot be read: {error}; delete the folder '{self.folder}' to fill it again"
            ) from None
        if not known:
            raise UserError(
                f"'{path}' has format {contents['format']!r}, this version reads {FORMAT}; choose another folder"
            )
        return contents

    def _write(self, shards: Mapping[str, Mapping[str, Any]]) -> None:
        contents = {"format": FORMAT, "fingerprint": self.fingerprint, "shards": shards}
        write_text(self.folder / CACHE, json.dumps(contents, indent=1) + "\n")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / LOCK).open("w") as file:
            lock(file)
            yield


def _are_shards(shards: Any) -> bool:
    return isinstance(shards, dict) and all(
        isinstance(shard, dict) and {"bytes", "sha256"} <= shard.keys() for shard in shards.values()
    )


def refuse_stand_ins(batch: Batch) -> None:
    """Raises UserError if an image is unreadable: its substitute, and what is mixed with it, are other views."""
    if batch.unreadable:
        raise UserError(
            f"a logit cache needs every training image, and one can no longer be read: "
            f"{next(iter(batch.unreadable.values()))}; restore it and run again to go on, or train without --cache"
        )


class StoredLogits:
    """The logits that `Teachers` returns for a batch of training views, read from a cache.

    One epoch at a time is in memory, in its stored form.

    Args:
        cache: checked here; its epochs must be stored.
        teachers: their names.
        form: how their logits are stored.
    """

    def __init__(self, cache: LogitCache, teachers: Sequence[str], form: Form) -> None:
        cache.check()
        self.cache, self.teachers, self.form = cache, tuple(teachers), form
        self._epoch, self._arrays = -1, Arrays()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """{teacher: [B, K] float32} on the batch's device.

        Raises:
            UserError: a damaged shard, or an image that can no longer be read, so that its view is another one.
        """
        refuse_stand_ins(batch)
        if batch.epoch != self._epoch:
            self._epoch, self._arrays = batch.epoch, self.cache.read(batch.epoch)
        rows = batch.index.cpu().numpy()
        answers = {name: self.form.unpack(name, self._arrays, rows) for name in self.teachers}
        if batch.images.is_cuda:  # a copy from pinned memory does not wait for the device
            answers = {name: logits.pin_memory() for name, logits in answers.items()}
        return {name: logits.to(batch.images.device, non_blocking=True) for name, logits in answers.items()}


def seed_folder(cache: Path, seed: int) -> Path:
    return cache / f"seed-{seed}"


def _locked(file: FileIO, path: Path) -> bool:
    """Locks an open file. False if another process has locked it, or has renamed or removed it meanwhile."""
    try:
        lock(file, wait=False)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _damaged(path: Path, fault: str | None) -> UserError:
    return UserError(f"'{path}' is damaged: {fault}; delete this file and run again to make it again")
