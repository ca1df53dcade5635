"""One program at a time writes into a run directory."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from coadvise import machine
from coadvise.errors import UserError
from coadvise.storage import is_supervised
from coadvise.training.engine import Engine

LOCK = ".lock"
_WAIT_SECONDS = 10.0  # loader processes of a killed program hold its lock until they notice and end


@contextmanager
def lock_folder(folder: Path, engine: Engine) -> Iterator[None]:
    """Creates the run directory and locks it. The lock of a program that died is free at once.

    All ranks wait here for each other: until then each reads the folder as it was, and none writes.

    Raises:
        UserError: the folder cannot be created or written, or another program has locked it.
    """
    engine.barrier()
    if not engine.is_main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = None if is_supervised() else (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"cannot write to '{folder}': {error.strerror}; make it writable, or choose another --out"
        ) from None
    if opened is None:  # a task of a cluster, which has this folder by its ticket
        yield
        return
    with opened as lock:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not _locked(lock):
            lock.seek(0)
            holder = lock.read().strip()
            if _is_alive(holder) or time.monotonic() > deadline:
                raise UserError(f"'{folder}' is in use by {holder}; wait for it, or choose another --out")
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _locked(lock: TextIO) -> bool:
    try:
        machine.lock(lock, wait=False)
    except BlockingIOError:
        return False
    return True


def _is_alive(holder: str) -> bool:
    """Whether the program named in a lock still runs. On another host it counts as running."""
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
