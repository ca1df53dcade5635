"""Studies of made images, all in one folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import Stopper, never

from coadvise.studies.runner import run_study


class StudyStopper(Stopper):
    """A stopper that ignores the name of the row: each row has one network of a seed."""

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        super().progress(part.rpartition(": ")[2], done, total, figures)


@dataclass(frozen=True)
class Studied:
    """A study's folder, in which tests share what they train."""

    images: Path
    preset: str
    out: Path

    def run(self, name: str, seeds: int = 1, **options: Any) -> tuple[dict[str, Any], list[str]]:
        """What the study found, and the parts that were trained for it."""
        listener = StudyStopper(never)
        common = {"preset": self.preset, "seeds": seeds, "out": self.out}
        result = run_study(name, self.images, listener, **{**common, **options})
        return result, [part for part, done in listener.steps if done == 1 and part != "corruptions"]
