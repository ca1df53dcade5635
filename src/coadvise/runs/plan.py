"""What a run trains: its networks, their names and their order."""

from dataclasses import dataclass

from coadvise.config import RunConfig

TEACHER, ADVISED, ALONE = "teacher", "advised", "alone"
_KIND_NAMES = {"conv": "conv teacher", "inv": "involution teacher"}


@dataclass(frozen=True)
class Part:
    """One network of a run. `name` is its key in the record and its folder in the run directory."""

    name: str
    role: str
    seed: int
    teacher: str = ""

    @property
    def title(self) -> str:
        """What the user reads."""
        if self.role == TEACHER:
            return _KIND_NAMES.get(self.teacher, f"{self.teacher} teacher")
        return f"student {'co-advised' if self.role == ADVISED else 'alone'} (seed {self.seed})"


def plan(config: RunConfig, seeds: int, baseline: bool) -> list[Part]:
    """The networks a run trains, in order."""
    parts = [Part(f"teachers/{name}", TEACHER, config.seed, name) for name in config.teachers]
    for seed in range(config.seed, config.seed + seeds):
        parts.append(Part(f"students/advised-{seed}", ADVISED, seed))
        if baseline:
            parts.append(Part(f"students/alone-{seed}", ALONE, seed))
    return parts
