"""How fast the command line answers, against `python -c "import torch"`.

Each command is a whole process, from start to exit, with its output discarded; the last two are refused, as they must
be before anything heavy is imported. Commands take turns, and every figure is a median of at most five. `coadvise` is
the script beside this Python, or `python -m coadvise` if there is none. The floor is Python itself (`python -c pass`).
The goal is a third of the peer's time.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.table import Row, Setting, Table, machine
from coadvise.evaluation.speed import interleaved

GOAL = 3.0
COMMANDS = ("--help", "--version", "presets", "studies", "fit /does/not/exist", "fit digits no.such.key=1")
REFUSED = COMMANDS[-2:]


def coadvise() -> list[str]:
    script = Path(sys.executable).with_name("coadvise")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "coadvise"]


def process(command: Sequence[str], refused: bool) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if bool(done.returncode) is not refused:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")


def run(setting: Setting) -> Table:
    calls: dict[str, Callable[[], object]] = {
        name: partial(process, [sys.executable, "-c", code], refused=False)
        for name, code in (("floor", "pass"), ("peer", "import torch"))
    }
    for command in COMMANDS:
        calls[command] = partial(process, [*coadvise(), *command.split()], command in REFUSED)
    seconds = interleaved(calls, min(setting.repeats, 5), synchronise=lambda: None)
    rows = [
        Row(f"coadvise {command}", "ms", *(1000 * seconds[name] for name in (command, "peer", "floor")), GOAL)
        for command in COMMANDS
    ]
    return Table("the command line against importing torch", "import torch", rows, machine(setting))
