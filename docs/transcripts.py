"""Runs the commands that a page shows and writes what they print below them.

    python docs/transcripts.py PAGE...      in a folder that holds what the commands name

A command stands in the first line of a `text` block, behind `$ `. It may end in `| head -n N`. A dry run belongs
before the training whose time it foresees.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

SHOWN = re.compile(r"^```text\n\$ (coadvise .+?)( \| head -n (\d+))?\n(?:.*\n)*?```$", re.MULTILINE)
ENDED_WELL = (0, 2)  # pages show errors of the user's, too


def transcribed(page: str) -> str:
    """The page with what its commands print now."""
    return SHOWN.sub(lambda block: f"```text\n$ {block[1]}{block[2] or ''}\n{_printed(block[1], block[3])}```", page)


def _printed(command: str, most: str | None) -> str:
    print(f"$ {command}", file=sys.stderr)
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode not in ENDED_WELL:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}")
    lines = done.stdout.splitlines()[: int(most) if most else None]
    return "".join(f"{line.rstrip()}\n" for line in lines)


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(transcribed(page.read_text()))
