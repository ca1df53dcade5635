"""This machine: the cache folder, the cores, how memory is reused, locks and signals."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def cache_path() -> Path | None:
    """`$XDG_CACHE_HOME/coadvise`, by default `~/.cache/coadvise`, which need not exist; None without a home folder.

    It holds what any later run may use and the user may delete at any time.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "coadvise")
    except RuntimeError:
        return None


def cache_folder() -> Path | None:
    """`cache_path`, created if needed; None where it cannot be created or written."""
    folder = cache_path()
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home
        return None
    return folder if folder is not None and os.access(folder, os.W_OK) else None


def available_cores() -> int:
    """How many cores this process may use: those of its CPU affinity where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_facts() -> list[str]:
    """The lines of /proc/cpuinfo, such as "flags : avx2 ..."; none where there is no such file."""
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for the next step. Returns whether it does so.

    By default glibc returns the buffers of every step to the system and gets them again page by page, each zeroed
    first: up to a fifth of a small teacher's time, and about as much of a loader's (docs/LOG.md). The
    process then holds on to the most memory that it ever needed. C libraries without `mallopt` are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Some versions of glibc accept at most 32 MiB for the size from which the system is asked directly.
    kept = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_TOP_PAD, 2**26))


def lock(file: IO[str] | IO[bytes] | int, shared: bool = False, wait: bool = True) -> None:
    """Locks an open file until it is closed. Does nothing where the system has no such locks, as `shortcomings` says.

    Args:
        shared: several processes may hold it so at the same time.
        wait: for another process; otherwise its lock is a BlockingIOError.
    """
    if fcntl is not None:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


STOPS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # the last two come from batch systems before their time limit


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals on which a run saves its step and stops: those that the system has."""
    return tuple(getattr(signal, name) for name in STOPS if hasattr(signal, name))


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """The signals to stop call `handler` meanwhile; nothing changes where another thread than the main one asks."""
    try:
        before = {name: signal.signal(name, handler) for name in stop_signals()}
    except ValueError:  # only the main thread may handle signals
        before = {}
    try:
        yield
    finally:
        for name, old in before.items():
            signal.signal(name, old)


def shortcomings() -> list[str]:
    """What a run must do without on this system, in lines for the user."""
    if fcntl is not None:
        return []
    return ["this system has no file locks: nothing keeps two commands from writing into the same run or cache"]
