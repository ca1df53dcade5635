"""What a run trains: its networks, their names and their order."""

from dataclasses import dataclass

from coadvise.config import RunConfig

TEACHER, ADVISED, ALONE = "teacher", "advised", "alone"
_KIND_NAMES = {"conv": "conv teacher", "inv": "involution teacher"}


@dataclass(frozen=True)
class Arm:
    """One network of a run. `part` names it in the record and is its folder in the run directory."""

    part: str
    role: str
    seed: int
    teacher: str = ""

    @property
    def name(self) -> str:
        if self.role == TEACHER:
            return _KIND_NAMES.get(self.teacher, f"{self.teacher} teacher")
        return f"student {'co-advised' if self.role == ADVISED else 'alone'} (seed {self.seed})"


def plan(config: RunConfig, seeds: int, baseline: bool) -> list[Arm]:
    """The networks a run trains, in order."""
    arms = [Arm(f"teachers/{name}", TEACHER, config.seed, name) for name in config.teachers]
    for seed in range(config.seed, config.seed + seeds):
        arms.append(Arm(f"students/advised-{seed}", ADVISED, seed))
        if baseline:
            arms.append(Arm(f"students/alone-{seed}", ALONE, seed))
    return arms
