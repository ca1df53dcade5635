"""Where a run tells what it does."""

from collections.abc import Mapping
from typing import Protocol


class Listener(Protocol):
    """Where a run tells what it does."""

    def say(self, text: str) -> None: ...

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None: ...


class Silent:
    """The default of the Python interface."""

    def say(self, text: str) -> None:
        return

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        return
