"""A run in a process of its own, which can be killed at an exact place; and whether it came to the same end.

Children are forked: they start at once, so that a campaign of many is short. The parent itself computes nothing, so it
has no threads that a fork would lose.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tiny import PRESET, Stopper, contents, make_images, never, records, write_preset

from coadvise import fit
from coadvise import storage as checkpoint
from coadvise.errors import Interrupted, UserError
from coadvise.training import metrics as record

SAVING = {checkpoint.__file__, record.__file__}
FINISHED, STOPPED, REFUSED, FAULT = 0, 10, 11, 12


@dataclass(frozen=True)
class Place:
    """A place in a run: the number-th call of any function, or of one at or below those that read and write."""

    number: int
    saving: bool


class _Calls:
    """Counts calls, Python's and C's (`os.fsync`, `write`, `rename`); at `place` the process kills itself."""

    def __init__(self, place: Place | None) -> None:
        self.place = place
        self.count = {False: 0, True: 0}
        self.depth = 0  # of functions of SAVING

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        ours = frame.f_code.co_filename in SAVING and event in ("call", "return")
        if ours and event == "call":
            self.depth += 1
        if event in ("call", "c_call"):
            self.count[False] += 1
            self.count[True] += self.depth > 0
            if self.place and self.count[self.place.saving] == self.place.number:
                os.kill(os.getpid(), signal.SIGKILL)
        if ours and event == "return":
            self.depth -= 1


class _Log(Stopper):
    """Writes down what happens where it outlives the process."""

    def __init__(self, path: Path, stop_at: Callable[[str, int], bool]) -> None:
        super().__init__(stop_at)
        self.file = path.open("w", buffering=1)

    def say(self, text: str) -> None:
        self.file.write(json.dumps({"said": text}) + "\n")

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"part": part, "step": done}) + "\n")
        super().progress(part, done, total, figures)


@dataclass(frozen=True)
class Outcome:
    """How a child ended, and what it wrote down."""

    code: int  # of the above, or minus the signal
    said: tuple[str, ...]
    steps: tuple[tuple[str, int], ...]
    message: str
    calls: Mapping[str, int]


class Victims:
    """Runs of one tiny configuration: 8 steps of each of four networks, a checkpoint after every second."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.data = make_images(folder / "images")
        self.preset = write_preset(folder, PRESET.replace("epochs: 2", "epochs: 4"))

    def start(
        self, run: Path, place: Place | None = None, stop_at: Callable[[str, int], bool] = never, count: bool = False
    ) -> Outcome:
        """Starts or goes on with a run, to its end or to `place`."""
        log, end = self.folder / "log", self.folder / "end"
        end.write_text("{}")
        child = os.fork()
        if child == 0:
            self._live(run, place, stop_at, count, log, end)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        last = json.loads(end.read_text())
        return Outcome(
            code,
            tuple(line["said"] for line in lines if "said" in line),
            tuple((line["part"], line["step"]) for line in lines if "part" in line),
            last.get("message", ""),
            last.get("calls", {}),
        )

    def _live(
        self, run: Path, place: Place | None, stop_at: Callable[[str, int], bool], count: bool, log: Path, end: Path
    ) -> None:
        """In the child."""
        code, message, calls = FAULT, "", _Calls(place)
        try:
            listener = _Log(log, stop_at)
            if place or count:
                sys.setprofile(calls)
            fit(self.data, self.preset, run, baseline=True, listener=listener)
            code = FINISHED
        except Interrupted:
            code = STOPPED
        except UserError as error:
            code, message = REFUSED, str(error)
        except BaseException:
            message = traceback.format_exc()
        finally:
            sys.setprofile(None)
            counted = {"any": calls.count[False], "saving": calls.count[True]}
            end.write_text(json.dumps({"message": message, "calls": counted}))
            os._exit(code)


def result(run: Path) -> dict[str, Any]:
    """Everything that a finished run is: every weight, and every number that does not depend on the clock."""
    weights = {n: data for n, data in contents(run).items() if n.endswith("model.safetensors")}
    last = {r["part"]: r for r in records(run, "result")}
    by_part = {
        kind: sorted(records(run, kind), key=lambda record: (record["part"], record["step"]))
        for kind in ("train", "eval")
    }  # a network that is trained again is recorded later
    return {"weights": weights, **by_part, "last": last, "verdict": records(run, "verdict")[-1]}
