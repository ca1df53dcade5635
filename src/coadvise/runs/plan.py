"""What a run will do: its folder, its configuration and its networks. Planning imports nothing heavy.

Bad input is refused here, before PyTorch is imported.
"""

from dataclasses import dataclass
from pathlib import Path

from coadvise.config.reading import load_config, with_cache
from coadvise.config.schema import RunConfig
from coadvise.data.sources import NAMED, Source, short_name, source_of, typical_size
from coadvise.errors import UserError
from coadvise.runs.options import FitOptions

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


@dataclass(frozen=True)
class RunPlan:
    """One run directory to fill.

    Attributes:
        folder: the run directory.
        config: the configuration.
        parts: the networks wanted, teachers first.
        cache: the logit cache that advises the students. None: teachers run during their training.
        reuse: another run, whose identical networks are copied.
        jobs: networks to train at the same time.
        allow_changes: continue although the configuration or the images changed.
        introduce: tell the user about the data and the folder.
        chosen_preset: the preset that was chosen by the size of the images; "" if the user named one.
        source: the images, if planning found them already.
    """

    folder: Path
    config: RunConfig
    parts: tuple[Part, ...]
    cache: Path | None = None
    reuse: Path | None = None
    jobs: int = 1
    allow_changes: bool = False
    introduce: bool = True
    chosen_preset: str = ""
    source: Source | None = None

    @property
    def teachers(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.role == TEACHER)

    @property
    def students(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.role != TEACHER)


def plan_fit(options: FitOptions) -> RunPlan:
    """Plans a run. Raises UserError for a folder, preset, key or value that cannot be used; writes nothing."""
    chosen = options.preset or default_preset(options.data)
    config = load_config(chosen, options.overrides, options.seed, options.data)
    if options.cache is None and config.cache is not None:
        raise UserError("this configuration advises students by stored logits (cache); give --cache DIR")
    if options.cache is not None and config.cache is None:
        config = with_cache(config)  # logits are rounded, so it changes the results
    source = source_of(config)
    name = f"{short_name(options.data)}-{Path(chosen).stem}-seed{config.seed}"
    return RunPlan(
        folder=options.out or Path("runs", name),
        config=config,
        parts=tuple(run_parts(config, options.seeds, options.baseline)),
        cache=options.cache,
        reuse=options.reuse,
        jobs=options.jobs,
        allow_changes=options.allow_changes,
        chosen_preset="" if options.preset else chosen,
        source=source,
    )


def run_parts(config: RunConfig, seeds: int, baseline: bool) -> list[Part]:
    """The networks of a run, in order."""
    parts = [Part(f"teachers/{name}", TEACHER, config.seed, name) for name in config.teachers]
    for seed in range(config.seed, config.seed + seeds):
        parts.append(Part(f"students/advised-{seed}", ADVISED, seed))
        if baseline:
            parts.append(Part(f"students/alone-{seed}", ALONE, seed))
    return parts


def default_preset(data: str | Path) -> str:
    """The preset of a named source; `small-images` for images of up to 96 pixels, `photos` for larger ones."""
    if (named := NAMED.get(str(data))) is not None:
        return named.preset
    return "small-images" if typical_size(data) <= 96 else "photos"
