"""`python chaos.py [--seed N] [--tries N]` kills runs at random places, and exits with 1 if any was lost.

Half of the places are inside what reads and writes. After each kill the same call goes on, until the run is finished;
it is then compared with an undisturbed one. Runs are forked children, so they start at once; the parent computes
nothing, so a fork loses no threads.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tiny import PRESET, contents, make_images, records, write_preset

from coadvise import fit, storage
from coadvise.training import checkpoint, metrics
from coadvise.training.checkpoint import Checkpoints
from coadvise.training.listener import Silent

SAVING = {storage.__file__, metrics.__file__}
FINISHED, FAULT, KILLED = 0, 12, -9  # exit codes of a child


@dataclass(frozen=True)
class Place:
    """A place in a run: the number-th call of any function, or of one at or below those that read and write."""

    number: int
    saving: bool


class Calls:
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


class Log(Silent):
    """Writes what happens to a file, which outlives the process."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", buffering=1)

    def say(self, text: str) -> None:
        self.file.write(json.dumps({"said": text}) + "\n")

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"part": part, "step": done}) + "\n")


class Victims:
    """Runs of one tiny configuration: 8 steps of each of four networks, a checkpoint after every step."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        checkpoint.WRITING_SHARE = 0
        text = PRESET.replace("epochs: 2", "epochs: 4").replace("checkpoint_seconds: 0", "checkpoint_seconds: 1e-9")
        self.folder, self.data, self.preset = folder, make_images(folder / "images"), write_preset(folder, text)
        self.log, self.end = folder / "log", folder / "end"

    def start(self, run: Path, place: Place | None = None, count: bool = False) -> tuple[int, dict[str, Any]]:
        """Starts or resumes a run, to its end or to `place`. Returns its exit code, its calls and its fault."""
        self.end.write_text("{}")
        child = os.fork()
        if child == 0:
            self._live(run, Calls(place), place is not None or count)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(self.end.read_text())

    def _live(self, run: Path, calls: Calls, counting: bool) -> None:
        """In the child."""
        code, fault = FAULT, ""
        try:
            if counting:
                sys.setprofile(calls)
            fit(self.data, self.preset, run, baseline=True, listener=Log(self.log))
            code = FINISHED
        except BaseException:
            fault = traceback.format_exc()
        finally:
            sys.setprofile(None)
            self.end.write_text(json.dumps({"fault": fault, "any": calls.count[False], "saving": calls.count[True]}))
            os._exit(code)

    def wrong_start(self, saved: Mapping[str, int]) -> str:
        """What is wrong with where the last run went on, or nothing."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        if damaged := [line["said"] for line in lines if "damaged" in line.get("said", "")]:
            return f"a kill has damaged something: {damaged}"
        first = dict(reversed([(line["part"], line["step"]) for line in lines if "part" in line]))
        for part, step in first.items():
            if step != saved.get(part, 0) + 1:
                return f"{part} went on at step {step}, its checkpoint was of step {saved.get(part, 0)}"
        return ""


def newest_checkpoints(run: Path) -> dict[str, int]:
    """The step of each network's newest whole checkpoint."""
    newest = {folder: Checkpoints(folder).latest()[0] for folder in (run / "checkpoints").glob("*")}
    return {f.name.replace(".", "/"): int(n.name.removeprefix("step-")) for f, n in newest.items() if n is not None}


def result(run: Path) -> dict[str, Any]:
    """Everything about a finished run: every weight, and every number that does not depend on the clock."""
    weights = {n: data for n, data in contents(run).items() if n.endswith("model.safetensors")}
    last = {r["part"]: r for r in records(run, "result")}
    by_part = {
        kind: sorted(records(run, kind), key=lambda record: (record["part"], record["step"]))
        for kind in ("train", "eval")
    }  # a network that is trained again is recorded later
    return {"weights": weights, **by_part, "last": last, "verdict": records(run, "verdict")[-1]}


def kill(tries: int, seed: int, folder: Path) -> list[str]:
    """Kills runs `tries` times in all. Returns a line for each run that was lost."""
    draw, victims, path = random.Random(seed), Victims(folder), folder / "run"
    code, counted = victims.start(folder / "undisturbed", count=True)
    assert code == FINISHED, counted["fault"]
    wanted, tried, lost = result(folder / "undisturbed"), 0, list[str]()
    while tried < tries:
        shutil.rmtree(path, ignore_errors=True)
        kills, code = list[Place](), KILLED
        while code == KILLED:
            saving, saved = draw.random() < 0.5, newest_checkpoints(path)
            place = Place(draw.randrange(1, counted["saving" if saving else "any"]), saving)
            code, end = victims.start(path, place if tried < tries else None)
            if fault := victims.wrong_start(saved):
                lost.append(f"{kills[-1:] or 'start'}: {fault}")
            if code == KILLED:
                kills.append(place)
                tried += 1
        if code != FINISHED or result(path) != wanted:
            lost.append(f"{kills}: {end['fault'] or 'another result'}")
    return lost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kills runs at random places.")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same tries")
    parser.add_argument("--tries", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        faults = kill(given.tries, given.seed, Path(scratch))
    print(f"tried {given.tries}, lost {len(faults)}", *faults, sep="\n")
    sys.exit(1 if faults else 0)
