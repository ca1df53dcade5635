"""Faults at random: how many were tried, survived and lost. `python -m chaos [CAMPAIGN ...]`, deterministic by seed.

A campaign is a function (tries, seed, folder) -> Tally in a module of this package, and its name and size in CAMPAIGNS.
"""

from dataclasses import dataclass, field

# module `chaos.NAME` with a function `run`, and how many tries it is given
CAMPAIGNS = {"kill": 50, "corrupt": 50, "mutate": 200, "fuzz": 2000}


@dataclass
class Tally:
    """What came of a campaign; `lost` says, a line each, what went wrong."""

    name: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)  # how often what happened

    @property
    def survived(self) -> int:
        return self.tried - len(self.lost)

    def note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    def __str__(self) -> str:
        notes = ", ".join(f"{what} {count}" for what, count in sorted(self.notes.items()))
        lines = [f"{self.name}: tried {self.tried}, survived {self.survived}, lost {len(self.lost)} ({notes})"]
        return "\n".join(lines + [f"  lost: {line}" for line in self.lost])
