"""A run in a process of its own that can be killed at an exact place, and whether it came to the same end.

Children are forked, so they start at once. The parent computes nothing, so a fork loses no threads.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tiny import PRESET, Stopper, contents, make_images, never, records, write_preset

from coadvise import fit, storage
from coadvise.errors import Interrupted, UserError
from coadvise.training import checkpoint, metrics

SAVING = {storage.__file__, metrics.__file__}
FINISHED, STOPPED, REFUSED, FAULT = 0, 10, 11, 12  # exit codes of a child


@dataclass
class Tally:
    """The result of a campaign; `lost` has a line for each try that went wrong."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)  # how often what happened

    def note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    def __str__(self) -> str:
        notes = ", ".join(f"{what} {count}" for what, count in sorted(self.notes.items()))
        first = f"tried {self.tried}, survived {self.tried - len(self.lost)}, lost {len(self.lost)} ({notes})"
        return "\n".join([first, *(f"  lost: {line}" for line in self.lost)])


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
    """Writes what happens to a file, which outlives the process."""

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
    """How a child ended, and what it wrote."""

    code: int  # one of the above, or minus the signal
    said: tuple[str, ...]
    steps: tuple[tuple[str, int], ...]
    message: str
    calls: Mapping[str, int]


class Victims:
    """Runs of one tiny configuration: 8 steps of each of four networks, a checkpoint after every step."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        checkpoint.WRITING_SHARE = 0
        text = PRESET.replace("epochs: 2", "epochs: 4").replace("checkpoint_seconds: 0", "checkpoint_seconds: 1e-9")
        self.folder, self.data, self.preset = folder, make_images(folder / "images"), write_preset(folder, text)

    def start(
        self, run: Path, place: Place | None = None, stop_at: Callable[[str, int], bool] = never, count: bool = False
    ) -> Outcome:
        """Starts or resumes a run, to its end or to `place`."""
        log, end = self.folder / "log", self.folder / "end"
        end.write_text("{}")
        child = os.fork()
        if child == 0:
            self._live(run, _Calls(place), place is not None or count, _Log(log, stop_at), end)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        last = json.loads(end.read_text())
        said = tuple(line["said"] for line in lines if "said" in line)
        steps = tuple((line["part"], line["step"]) for line in lines if "part" in line)
        return Outcome(code, said, steps, last.get("message", ""), last.get("calls", {}))

    def _live(self, run: Path, calls: _Calls, counting: bool, listener: _Log, end: Path) -> None:
        """In the child."""
        code, message = FAULT, ""
        try:
            if counting:
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
    """Everything about a finished run: every weight, and every number that does not depend on the clock."""
    weights = {n: data for n, data in contents(run).items() if n.endswith("model.safetensors")}
    last = {r["part"]: r for r in records(run, "result")}
    by_part = {
        kind: sorted(records(run, kind), key=lambda record: (record["part"], record["step"]))
        for kind in ("train", "eval")
    }  # a network that is trained again is recorded later
    return {"weights": weights, **by_part, "last": last, "verdict": records(run, "verdict")[-1]}
