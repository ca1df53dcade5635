"""Where things are kept that any later run may use, and anybody may delete: `~/.cache/coadvise`."""

import ctypes
import os
from pathlib import Path


def cache_path() -> Path | None:
    """`$XDG_CACHE_HOME/coadvise`, by default `~/.cache/coadvise`, whether it is there or not; None without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "coadvise")
    except RuntimeError:
        return None


def cache_folder() -> Path | None:
    """`cache_path`, made where it was not there; None where it cannot be made or written."""
    folder = cache_path()
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home
        return None
    return folder if folder is not None and os.access(folder, os.W_OK) else None


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed, for the next step to use. Returns whether it does.

    Otherwise glibc gives the maps of every step back to the system, and gets them again page by page, each zeroed
    first: up to a fifth of a small teacher's time (benchmarks/allocator.py), about as much of a loader's. The process
    then keeps the most memory that it ever needed. Another C library is left as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Some versions of glibc take no more than 32 MiB as the size from which on maps come from the system directly.
    kept = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_TOP_PAD, 2**26))
