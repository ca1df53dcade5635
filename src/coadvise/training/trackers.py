"""Trackers: each gets every record of a run, as it is in `metrics.jsonl`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coadvise.errors import UserError

Tracker = Callable[[dict[str, Any]], None]  # gets one record


def tensorboard() -> Callable[[Path], Tracker]:
    """Writes losses and accuracies as TensorBoard events to the folder `tensorboard` of a run directory."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("engine.tensorboard=true needs TensorBoard; install coadvise[tensorboard]") from None

    def start(run: Path) -> Tracker:
        writer = SummaryWriter(run / "tensorboard")

        def track(record: dict[str, Any]) -> None:
            for group in ("losses", "top1") if record["kind"] in ("train", "eval") else ():
                for name, value in record.get(group, {}).items():
                    writer.add_scalar(f"{record['part']}/{group}/{name}", value, record["step"])

        return track

    return start


_TRACKERS = {"tensorboard": tensorboard}


def tracker(name: str) -> Callable[[Path], Tracker]:
    """The function that starts a tracker in a run directory. Raises UserError if its package is not installed."""
    return _TRACKERS[name]()
