"""Where things are kept that any later run may use, and anybody may delete: `~/.cache/coadvise`."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/coadvise`, by default `~/.cache/coadvise`; None where it cannot be made or written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "coadvise")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none
        return None
    return folder if os.access(folder, os.W_OK) else None
