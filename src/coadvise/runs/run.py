"""A run: what its networks are called, what they share, and the directory that is theirs alone."""

import fcntl
import json
import os
import platform
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from coadvise.advice import AVERAGE, CLASS
from coadvise.config import FREE, RunConfig, differences, read_config
from coadvise.data.quarantine import Quarantine
from coadvise.data.scan import Dataset
from coadvise.data.sources import resolved
from coadvise.data.views import Views
from coadvise.distill.logit_cache import LogitCache, fingerprint, seed_folder
from coadvise.distill.teachers import Teachers, load_teachers
from coadvise.errors import UserError
from coadvise.models.network import Network
from coadvise.models.tokens import TokenModel
from coadvise.runs.plan import Part
from coadvise.storage import MANIFEST, contents, write_text
from coadvise.training.checkpoint import KEEP, Checkpoints
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.metrics import Recorder, last_of, read_records
from coadvise.training.trackers import tracker

CONFIG, DATA, LOCK = "config.yaml", "data.json", ".lock"
_BEGUN = (LOCK, f".{CONFIG}.part")  # what a run may leave that ended before it began
_LEFT_SECONDS = 10.0  # in which loader processes end that a killed program left; until then they hold its lock


@dataclass
class Run:
    """All that the steps of the main job share.

    `cache` is the logit cache that advises its students, None where its teachers do so themselves.
    """

    folder: Path
    config: RunConfig
    dataset: Dataset
    engine: Engine
    record: Recorder
    listener: Listener
    cache: Path | None = None

    def teacher_folder(self, name: str) -> Path:
        return self.folder / "teachers" / name

    def load_teachers(self) -> Teachers:
        """The run's finished teachers, where and as they run fastest."""
        teachers = load_teachers(
            {name: self.teacher_folder(name) for name in self.config.teachers}, self.dataset.classes
        )
        for teacher in teachers.by_name.values():
            self.engine.prepare(teacher)
        return teachers

    def student_views(self, seed: int) -> Views:
        """What students of a seed are trained on, advised or alone."""
        config, classes = self.config, len(self.dataset.classes)
        return Views(self.dataset.train, config.augment, classes, config.data.image_size, seed)

    def checkpoints(self, part: Part) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints" / part.name.replace("/", "."))

    def describe(self, seeds: list[int], changed: list[str]) -> None:
        """Writes what the run is: its configuration (and what was changed in it), its data, where it is computed.

        Raises:
            UserError: the run was begun with other images to be scored.
        """
        if self.engine.is_main:
            data = data_record(self.dataset, self.config.data.image_size)
            for change in _changes(self.folder, data):
                self.record.say(change)
            write_text(self.folder / CONFIG, self.config.to_yaml())
            write_text(self.folder / DATA, json.dumps(data, indent=1))
            Quarantine(self.folder, self.dataset.train, self.config.data.max_unreadable).begin()
        cache = str(self.cache) if self.cache else None
        self.record.add("run", **_run_record(self.engine, seeds), changed=changed, cache=cache)


def check_folder(folder: Path, config: RunConfig, allow_changes: bool) -> list[str]:
    """A run directory is new, or holds this very run, or one whose changes are allowed. Returns the changes.

    Nothing in it may lead elsewhere.
    """
    if folder.exists() and (
        not folder.is_dir()
        or not ((folder / CONFIG).is_file() or all(path.name in _BEGUN for path in folder.iterdir()))
    ):
        raise UserError(f"'{folder}' exists and is no run directory; choose another --out")
    inside = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            raise UserError(f"{str(path)!r} leads out of the run directory, and a run writes nowhere else; remove it")
    if (folder / CONFIG).is_file():
        old = _written_config(folder / CONFIG)
        if old.cache is not None and config.cache is None and not allow_changes:
            raise UserError(
                f"'{folder}' holds a run whose students are advised by stored logits; go on with it with --cache DIR "
                "(a folder without them has them made again), or choose another --out"
            )
        changed = differences(_respelled(folder, old, config), config)
        deciding = [line for line in changed if line.partition(":")[0] not in FREE]
        if deciding and not allow_changes:
            raise UserError(
                f"'{folder}' holds another run; it differs in {'; '.join(deciding[:6])}"
                + (f" and {len(deciding) - 6} more" if len(deciding) > 6 else "")
                + "; choose another --out, or give the same data, preset and overrides to go on with it, or "
                "--allow-changes to go on with these"
            )
        return changed
    return []


def check_run(folder: Path, instead: str = "give the folder that 'coadvise fit' printed") -> None:
    """Raises UserError for what is no run directory, and says what to give instead."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"'{folder}' is no run directory (no {CONFIG}); {instead}")


def check_no_run(folder: Path, instead: str) -> None:
    """Raises UserError for a run directory, which is no place for other things, and says what to give instead."""
    if (folder / CONFIG).is_file():
        raise UserError(f"'{folder}' is a run directory of 'coadvise fit'; {instead}")


def _respelled(folder: Path, old: RunConfig, new: RunConfig) -> RunConfig:
    """The configuration of the run in `folder`, naming images and teachers as `new` does where they are the same ones.

    A path may be spelled otherwise, or be relative to another directory. Images are the same in the same folder, a
    teacher is by its weights.
    """
    data, teachers, here = old.data, dict(old.teachers), resolved(new.data.source)
    if written_data(folder).get("folder") == here:
        data = data.model_copy(update={"source": new.data.source})
    for name in teachers.keys() & new.teachers.keys():
        before, now = teachers[name].checkpoint, new.teachers[name].checkpoint
        if before and now and before != now and contents(folder / "teachers" / name) == contents(Path(now)):
            teachers[name] = teachers[name].model_copy(update={"checkpoint": now})
    return old.model_copy(update={"data": data, "teachers": teachers})


def _written_config(path: Path) -> RunConfig:
    try:
        return read_config(path)
    except UserError as error:
        raise UserError(
            f"'{path}' is damaged or another version's: {error}; restore it, or choose another --out"
        ) from None


def check_space(folder: Path, checkpoints: list[int], at_a_time: int) -> None:
    """A disk that cannot hold what training writes is an error before anything is trained.

    Args:
        checkpoints: bytes of one of each network.
        at_a_time: networks that are trained at the same time.
    """
    together = sum(sorted(checkpoints)[-at_a_time:])
    # one more than is kept while it is written; and of each network its weights, at most half of its checkpoint
    needed = (KEEP + 1) * together + sum(checkpoints) // 2
    there = sum(path.stat().st_size for path in folder.rglob("*.*") if path.is_file())
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    if free + there < needed:
        raise UserError(
            f"'{folder}' needs {_megabytes(max(checkpoints))} a checkpoint, {_megabytes(needed)} in all; "
            f"{_megabytes(free)} are free on its disk; make room, or choose another --out"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


@contextmanager
def owned(folder: Path, engine: Engine) -> Iterator[None]:
    """Keeps a second program off the run directory; the lock of a program that died is free at once.

    No process begins to write before all have come here: what they looked for until then they found alike.

    Raises:
        UserError: the folder cannot be made or written, or another program has it.
    """
    engine.barrier()
    if not engine.is_main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"cannot write to '{folder}': {error.strerror}; make it writable, or choose another --out"
        ) from None
    with opened as lock:
        deadline = time.monotonic() + _LEFT_SECONDS
        while not _locked(lock):
            lock.seek(0)
            holder = lock.read().strip()
            if _runs(holder) or time.monotonic() > deadline:
                raise UserError(f"'{folder}' is in use by {holder}; wait for it, or choose another --out")
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _runs(holder: str) -> bool:
    """Whether the program that a lock names is there, as far as can be known from here."""
    number, _, host = holder.removeprefix("process ").partition(" on ")
    if host != socket.gethostname() or not number.isdecimal():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def open_record(folder: Path, config: RunConfig, engine: Engine, say: Callable[[str], None]) -> Recorder:
    """The run's record, which also feeds the trackers that were asked for."""
    trackers = [tracker(name)(folder) for name in config.engine.trackers] if engine.is_main else []
    return Recorder(folder, engine.is_main, say, trackers)


def data_record(dataset: Dataset, image_size: int) -> dict[str, Any]:
    """What `data.json` holds of a run's images."""
    count = len(dataset.classes)
    splits = {
        name: {"images": len(split), "per_class": split.per_class(count), "unreadable": list(split.unreadable)}
        for name, split in (("train", dataset.train), ("val", dataset.val))
    }
    splits["val"]["paths"] = dataset.val.split.names()
    return {
        "root": dataset.source.where,
        "folder": resolved(dataset.source.where),  # where a relative root was
        "classes": list(dataset.classes),
        "image_size": image_size,
        "note": dataset.source.note,
        "splits": splits,
    }


def check_images(folder: Path, dataset: Dataset, image_size: int) -> None:
    """Raises UserError where the images are not those that the run in `folder` began with."""
    here, there = data_record(dataset, image_size)["splits"], written_data(folder).get("splits")
    if there is not None and here != there:
        raise UserError(
            f"the images changed since '{folder}' began: {len(dataset.train)} to train on, {len(dataset.val)} to score "
            "can be read now; put them back, or run the same command again to go on with these"
        )


def written_data(folder: Path) -> dict[str, Any]:
    """What a run's `data.json` holds; nothing where there is none that can be read."""
    try:
        data = json.loads((folder / DATA).read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def with_resolved_source(folder: Path, config: RunConfig) -> RunConfig:
    """The configuration of the run in `folder` for use from any directory: its images' folder as it was resolved then.

    Where that is gone the configuration stays: all may have been moved, and a relative folder may still be right.
    """
    there = written_data(folder).get("folder")
    if not isinstance(there, str) or not Path(there).is_dir():
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"source": there})})


def _changes(folder: Path, data: dict[str, Any]) -> Iterator[str]:
    """How a run's images differ from those it was begun with. Raises UserError where those to be scored differ."""
    try:
        splits = written_data(folder)["splits"]
        scored, trained = [str(path) for path in splits["val"]["paths"]], splits["train"]["images"]
    except (LookupError, TypeError):
        return  # a new run, or nothing to compare with
    scored_now, trained_now = data["splits"]["val"]["paths"], data["splits"]["train"]["images"]
    if scored != scored_now:  # networks that were scored on other images cannot be compared
        gone, new = sorted(set(scored) - set(scored_now)), sorted(set(scored_now) - set(scored))
        odd = f"{gone[0]!r} is gone or unreadable" if gone else f"{new[0]!r} is new" if new else "their order changed"
        raise UserError(
            f"'{folder}' scores networks on {len(scored)} images, and now there are {len(scored_now)}: {odd}; put them "
            "back as they were, or choose another --out"
        )
    if trained != trained_now:
        yield f"training images: {trained} when the run began, {trained_now} now"


def _run_record(engine: Engine, seeds: list[int]) -> dict[str, Any]:
    packages = ("torch", "timm", "torchvision", "lightning-fabric", "numpy")
    program = Path(sys.argv[0]).name
    return {
        "version": version("coadvise"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": engine.describe(),
        "processes": engine.processes,
        "seeds": seeds,
        "command": shlex.join(["coadvise" if program == "__main__.py" else program, *sys.argv[1:]]),  # -m coadvise
    }


def cache_of(run: Run, seed: int) -> LogitCache:
    """The cache of one seed's views that advises the run's students."""
    assert run.cache is not None
    teachers = {name: run.teacher_folder(name) for name in run.config.teachers}
    return LogitCache(seed_folder(run.cache, seed), fingerprint(run.config, run.dataset, teachers, seed))


def trained_tokens(run: Path, part: str, network: Network) -> tuple[str, ...]:
    """The answers of a run's network that somebody trained there, which its result has.

    A student alone has heads that nobody advised, and so has one whose teachers have no weight.
    """
    if result := last_of(read_records(run), "result", part):
        return tuple(name for name in result["top1"] if name != AVERAGE)
    model = network.model
    return (
        (CLASS, *model.token_names)
        if part.startswith("students/advised") and isinstance(model, TokenModel)
        else (CLASS,)
    )


def trained_parts(run: Path) -> list[str]:
    """The finished networks of a run: teachers first, then students."""
    return [
        str(folder.parent.relative_to(run))
        for kind in ("teachers", "students")
        for folder in sorted((run / kind).glob(f"*/{MANIFEST}"), key=lambda p: _by_seed(p.parent.name))
    ]


def _by_seed(name: str) -> tuple[str, int, str]:
    """Sorts advised-2 before advised-10, and both before alone-2."""
    return name.rstrip("0123456789"), len(name), name
