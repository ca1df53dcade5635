"""Shared by all benchmarks: the setting, interleaved timing of training runs, and the table that is printed."""

import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from coadvise.config.schema import EngineConfig
from coadvise.training.engine import Engine
from coadvise.training.loop import Progress


@dataclass(frozen=True)
class Setting:
    """The options of the command line.

    Attributes:
        precision: "float32" or "bfloat16" (autocast or tensors, as the benchmark says).
        batch_size: in images; 0 means the benchmark's default.
        repeats: timed calls of each contestant, after one warm-up.
        compile: whether networks are compiled by torch.compile, ours and the peer's.
    """

    device: torch.device
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 0
    repeats: int = 9
    compile: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def engine(self) -> Engine:
        """An engine of this setting, to be entered."""
        device: Literal["cpu", "cuda"] = "cuda" if self.device.type == "cuda" else "cpu"
        return Engine(EngineConfig(device=device, precision=self.precision, compile=self.compile))

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        unit: of `ours`, `peer` and `floor`: "images/s" (higher is better), "ms" or "MB" (lower is better).
        ours, peer: medians.
        floor: what the machine allows at best.
        goal: the ratio to reach, or 0.
    """

    name: str
    unit: Literal["images/s", "ms", "MB"]
    ours: float
    peer: float | None = None
    floor: float | None = None
    goal: float = 0.0

    @property
    def ratio(self) -> float | None:
        """How many times as fast (or as small) as the peer; above 1 is better."""
        if self.peer is None:
            return None
        return self.ours / self.peer if self.unit == "images/s" else self.peer / self.ours


@dataclass(frozen=True)
class Table:
    """A finished benchmark. `about` holds the machine, the versions and the setting."""

    title: str
    peer: str
    rows: Sequence[Row]
    about: Mapping[str, str | int | float]
    notes: Sequence[str] = ()

    def lines(self) -> Iterator[str]:
        """The table as text; `!` marks a missed goal."""
        yield self.title
        yield ", ".join(f"{key} {value}" for key, value in self.about.items())
        yield ""
        width, peer = max(len(row.name) for row in self.rows) + 2, max(len(self.peer), 8) + 2
        yield f"{'':{width}}{self.peer:>{peer}}{'coadvise':>12}{'ratio':>9}{'floor':>12}{'goal':>8}  unit"
        for row in self.rows:
            missed = row.ratio is not None and row.ratio < row.goal
            goal = f"{row.goal:g}{'!' * missed}" if row.goal else ""
            ours = f"{_figure(row.ours):>12}{_figure(row.ratio):>9}{_figure(row.floor):>12}{goal:>8}"
            yield f"{row.name:{width}}{_figure(row.peer):>{peer}}{ours}  {row.unit}"
        yield from ("", *self.notes) if self.notes else ()

    def write(self, path: Path) -> None:
        """The table as JSON."""
        rows = [{**asdict(row), "ratio": row.ratio} for row in self.rows]
        record = {"title": self.title, "peer": self.peer, "about": dict(self.about), "rows": rows}
        path.write_text(json.dumps({**record, "notes": list(self.notes)}, indent=1) + "\n")


def in_turns(
    runs: Mapping[str, Callable[[Progress], object]], turn: int, skip: int, synchronise: Callable[[], None]
) -> dict[str, float]:
    """Median seconds per step of training runs that take turns of `turn` steps, so that slow moments affect all.

    Each run has a thread; one thread runs at a time. Not counted: the first `skip` turns, which warm up, and the last,
    in which `train` evaluates the network.

    Args:
        runs: each takes the same number of steps and calls the progress callback after every step.
    """
    names = list(runs)
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    gates = {name: threading.Semaphore(0) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failed = threading.Event()

    def work(name: str) -> None:
        since = 0.0

        def progress(part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            nonlocal since
            if done % turn or done == total:
                return
            synchronise()
            if done > skip * turn:
                seconds[name].append((time.perf_counter() - since) / turn)
            gates[following[name]].release()
            wait()
            since = time.perf_counter()

        def wait() -> None:
            gates[name].acquire()
            assert not failed.is_set(), "another run has failed"

        try:
            wait()
            runs[name](progress)
        except BaseException:
            failed.set()
            raise
        finally:
            gates[following[name]].release()

    with ThreadPoolExecutor(len(names)) as pool:
        ended = {name: pool.submit(work, name) for name in names}
        gates[names[0]].release()
    faults = [fault for run in ended.values() if (fault := run.exception()) is not None]
    if faults:
        raise next((fault for fault in faults if not isinstance(fault, AssertionError)), faults[0])
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine(setting: Setting) -> dict[str, str | int | float]:
    """Device and versions, for `Table.about`."""
    cpu = f"CPU {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with its build, which the package's version may lack
        "timm": version("timm"),
        "precision": setting.precision,
        "compiled": "yes" if setting.compile else "no",
    }


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
