"""What a run will do: its folder, its configuration and its networks. Planning imports nothing heavy.

Bad input is refused here, before PyTorch is imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coadvise.config.reading import load_config, parse_arguments, with_cache
from coadvise.config.schema import DataConfig, RunConfig
from coadvise.data.sources import NAMED, Source, short_name, source_of, typical_size
from coadvise.machine import available_cores
from coadvise.runs.options import LOCAL, FitOptions, RunOptions

PHOTOS, PHOTOS_SMALL, SMALL_IMAGES = BY_TIME = ("photos", "photos-small", "small-images")  # the slowest first
PATIENT = "-patient"  # what the name of a preset ends with that trains another's student for longer
MOST_ON_A_CORE = 7_500  # training images; at 2,500 an hour on two cores PHOTOS_SMALL takes six hours for so many
TEACHER, ADVISED, ALONE, START = "teacher", "advised", "alone", "start"
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
        if self.role == START:
            return "linear probe of the student's start"
        return f"student {'co-advised' if self.role == ADVISED else 'alone'} (seed {self.seed})"


def adaptation(part: Part, config: RunConfig) -> str:
    """How a network gets its weights: "train" or "finetune", "probe" (its head alone), "none" (it is only loaded)."""
    if part.role == TEACHER:
        return config.teachers[part.teacher].adaptation
    return "probe" if part.role == START else "train"


@dataclass(frozen=True)
class RunPlan:
    """One run directory to fill.

    Attributes:
        folder: the run directory.
        config: the configuration.
        parts: the networks wanted, teachers first.
        cache: the logit cache that advises the students. None: teachers run during their training.
        reuse: another run, whose identical networks are copied.
        jobs: networks to train at the same time; None: as many as `schedule.at_once` says.
        allow_changes: continue although the configuration or the images changed.
        introduce: tell the user about the data and the folder.
        preset: the name or file of the configuration; "" for a study's run.
        by_default: the preset was chosen here, and not by the user.
        source: the images, if planning found them already.
        on: where networks are trained, see `RunOptions`.
    """

    folder: Path
    config: RunConfig
    parts: tuple[Part, ...]
    cache: Path | None = None
    reuse: Path | None = None
    jobs: int | None = 1
    allow_changes: bool = False
    introduce: bool = True
    preset: str = ""
    by_default: bool = False
    source: Source | None = None
    on: str = LOCAL

    @property
    def teachers(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.role == TEACHER)

    @property
    def students(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.role != TEACHER)


def plan_fit(options: FitOptions) -> RunPlan:
    """Plans a run. Raises UserError for a folder, preset, key or value that cannot be used; writes nothing."""
    preset, config, source = configured(options)
    if options.cache is not None and config.cache is None:
        config = with_cache(config)  # logits are rounded, so it changes the results
    folder = options.out or Path("runs", f"{short_name(options.data)}-{Path(preset).stem}-seed{config.seed}")
    return RunPlan(
        folder=folder,
        config=config,
        parts=tuple(run_parts(config, options.seeds, options.baseline)),
        cache=options.cache or (folder / "cache" if config.cache is not None else None),
        reuse=options.reuse,
        jobs=options.given_jobs,
        on=options.on,
        allow_changes=options.allow_changes,
        preset=preset,
        by_default=options.preset is None,
        source=source,
    )


def configured(options: RunOptions) -> tuple[str, RunConfig, Source]:
    """The preset, given or chosen by the data and this machine; the configuration with it; and the data.

    Raises:
        UserError: data, a preset, a key or a value that cannot be used.
    """
    preset = options.preset or default_preset(options.data, options.overrides)
    config = load_config(preset, options.overrides, options.seed, options.data)
    source = source_of(config)
    if options.preset is None and preset == PHOTOS_SMALL and len(source.train) > MOST_ON_A_CORE * available_cores():
        preset = SMALL_IMAGES
        config = load_config(preset, options.overrides, options.seed, options.data)
    return preset, config, source


def run_parts(config: RunConfig, seeds: int, baseline: bool) -> list[Part]:
    """The networks of a run, in order. Beside a student that starts from other weights stands a probe of these."""
    parts = [Part(f"teachers/{name}", TEACHER, config.seed, name) for name in config.teachers]
    for seed in range(config.seed, config.seed + seeds):
        parts.append(Part(f"students/advised-{seed}", ADVISED, seed))
        if baseline:
            parts.append(Part(f"students/alone-{seed}", ALONE, seed))
    if baseline and config.student.start is not None:
        parts.append(Part(f"students/start-{config.seed}", START, config.seed))
    return parts


def default_preset(data: str | Path, overrides: Sequence[str] = ()) -> str:
    """The preset of a named source; `small-images` for images of up to 96 pixels; larger ones have one for a GPU."""
    if (named := NAMED.get(str(data))) is not None:
        return named.preset
    given = parse_arguments([text for text in overrides if text.startswith("data.")]).get("data", {})
    where = DataConfig(**{key: str(given[key]) for key in ("root", "image_column") if key in given})
    if typical_size(data, where) <= 96:
        return SMALL_IMAGES
    return PHOTOS if "engine.device=cpu" not in overrides and _has_gpu() else PHOTOS_SMALL


def faster_preset(preset: str) -> str | None:
    """The next preset that takes less time; None if there is none."""
    if (plain := preset.removesuffix(PATIENT)) != preset and plain in BY_TIME:
        return plain
    return BY_TIME[BY_TIME.index(preset) + 1] if preset in BY_TIME[:-1] else None


def _has_gpu() -> bool:
    import torch  # only where the choice depends on it

    return torch.cuda.is_available()
