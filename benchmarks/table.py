"""What every benchmark shares: interleaved timing, the table it prints, and what it says of the machine."""

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

from coadvise.training.loop import Progress


@dataclass(frozen=True)
class Setting:
    """What a benchmark was asked for.

    Attributes:
        device: where it runs.
        precision: "float32", or "bfloat16" (autocast or tensors, as the benchmark says).
        batch_size: images; 0 is the benchmark's own choice.
        repeats: timed calls of each contestant, after one that warms up.
        compile: whether networks are compiled by torch.compile, ours and the peer's alike.
    """

    device: torch.device
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 0
    repeats: int = 9
    compile: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what is compared.
        unit: of `peer`, `ours` and `floor`: "images/s" (more is better), or "ms" and "MB" (less is).
        peer, ours: medians; None where there is no such figure.
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
        """How many times as fast (or as small) as the peer; above 1 is better than it."""
        if self.peer is None:
            return None
        return self.ours / self.peer if self.unit == "images/s" else self.peer / self.ours


@dataclass(frozen=True)
class Table:
    """A finished benchmark: its rows, and everything one needs to know to read them."""

    title: str
    peer: str
    rows: Sequence[Row]
    about: Mapping[str, str | int | float]
    notes: Sequence[str] = ()

    def lines(self) -> Iterator[str]:
        """The table as text."""
        yield self.title
        yield ", ".join(f"{key} {value}" for key, value in self.about.items())
        width = max(len(row.name) for row in self.rows) + 2
        peer = max(len(self.peer), 8) + 2
        yield ""
        yield f"{'':{width}}{self.peer:>{peer}}{'coadvise':>12}{'ratio':>9}{'floor':>12}{'goal':>8}  unit"
        for row in self.rows:
            goal = "" if not row.goal else f"{row.goal:g}"
            if row.goal and row.ratio is not None and row.ratio < row.goal:
                goal += "!"
            figures = (
                f"{_figure(row.peer):>{peer}}{_figure(row.ours):>12}{_figure(row.ratio):>9}{_figure(row.floor):>12}"
            )
            yield f"{row.name:{width}}{figures}{goal:>8}  {row.unit}"
        yield from ("", *self.notes) if self.notes else ()

    def write(self, path: Path) -> None:
        """The table as JSON."""
        rows = [{**asdict(row), "ratio": row.ratio} for row in self.rows]
        record = {"title": self.title, "peer": self.peer, "about": dict(self.about), "rows": rows}
        path.write_text(json.dumps({**record, "notes": list(self.notes)}, indent=1) + "\n")


def in_turns(
    runs: Mapping[str, Callable[[Progress], object]], turn: int, skip: int, synchronise: Callable[[], None]
) -> dict[str, float]:
    """Median seconds a step of training runs that take turns, `turn` steps each, so that a slow moment falls on all.

    Each run is in a thread of its own, and one of them goes on at a time. The first `skip` turns, which warm up, are
    not counted, nor is the last, in which `train` scores its validation images.

    Args:
        runs: each takes the same number of steps and calls the progress callback after every one.
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
            gates[name].acquire()
            assert not failed.is_set(), "another run has failed"
            since = time.perf_counter()

        gates[name].acquire()
        try:
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
    if setting.device.type == "cuda":
        device = torch.cuda.get_device_name(setting.device)
    else:
        device = f"CPU {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with its build, which a package's own version need not name
        "timm": version("timm"),
        "precision": setting.precision,
        "compiled": "yes" if setting.compile else "no",
    }


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
