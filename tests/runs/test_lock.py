"""One program at a time writes into a run directory."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import records

from coadvise.config.schema import EngineConfig
from coadvise.errors import UserError
from coadvise.runs.lock import lock_folder
from coadvise.training.engine import Engine

HOLDER = """
import sys, time
from pathlib import Path
from coadvise.config.schema import EngineConfig
from coadvise.runs.lock import lock_folder
from coadvise.training.engine import Engine
with lock_folder(Path(sys.argv[1]), Engine(EngineConfig(device="cpu"))):
    print("held", flush=True)
    time.sleep(600)
"""


def held_here(folder: Path) -> bool:
    return (folder / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"


def test_the_holder_is_named_and_the_lock_of_a_dead_one_is_free(tmp_path: Path) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        named = rf"process {holder.pid} on {os.uname().nodename}"
        with pytest.raises(UserError, match=named), lock_folder(tmp_path, engine):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with lock_folder(tmp_path, engine):
        assert held_here(tmp_path)


def test_loader_processes_of_a_dead_program_are_waited_for(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = (tmp_path / ".lock").open("w")
    left.write(f"process {dead.pid} on {os.uname().nodename}")
    left.flush()
    fcntl.flock(left, fcntl.LOCK_EX)
    threading.Timer(0.5, left.close).start()
    with lock_folder(tmp_path, Engine(EngineConfig(device="cpu"))):
        assert held_here(tmp_path)


WITHOUT = """
import signal, sys
sys.modules["fcntl"] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
    delattr(signal, name)
import torch
torch.set_num_threads(2)  # so that two networks would be trained at a time
from coadvise.cli import main
main()
"""


def test_without_locks_and_signals_of_its_own_a_system_is_told_and_trains_the_same(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["fit", tiny_images, "--preset", tiny_preset, "--out", run, "--baseline"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("this system has no file locks: nothing keeps two commands from writing") == 1
    assert [record["kind"] for record in records(run)] == [record["kind"] for record in records(finished)]
