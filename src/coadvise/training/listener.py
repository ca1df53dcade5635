"""Where a run reports what it does."""

from collections.abc import Mapping
from typing import Protocol


class Listener(Protocol):
    """Gets a run's messages and progress."""

    def say(self, text: str) -> None: ...

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """A network has done so many steps of so many; `figures` are its latest losses and top-1, at ends of epochs."""


class Silent:
    """Ignores everything; the default in Python."""

    def say(self, text: str) -> None:
        return

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        return
