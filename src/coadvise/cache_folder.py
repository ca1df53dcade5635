"""Where things are kept that any later run may use, and anybody may delete: `~/.cache/coadvise`."""

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
