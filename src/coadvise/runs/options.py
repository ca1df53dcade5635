"""The options of a run, a study and a plan. Each is spelled once here, for Python and for the command line."""

import re
from dataclasses import MISSING, Field, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

from coadvise.config.reading import nearest
from coadvise.errors import UserError

NETWORKS = ("preset", "paper")
LOCAL, RAY, SLURM = PLACES = ("local", "ray", "slurm")  # where networks are trained
AUTO = "auto"
DATA, TRAINING, MACHINE, OUTPUT = "Data", "Training", "Machine", "Output"  # the groups of the help


@dataclass(frozen=True)
class Help:
    """What the help says of an option.

    Attributes:
        text: one or two sentences.
        group: the heading under which the help lists it.
        flag: its name on the command line where that differs from the field's.
        positional: given without a name on the command line. A field without a default is positional too.
    """

    text: str
    group: str
    flag: str = ""
    positional: bool = False


DATA_HELP = (
    "Folder with train/ and val/ or test/, folder of class folders, table of paths and labels, dataset of Hugging Face "
    "(hf:NAME, or saved to disk), shards:URL, or 'digits'."
)
DataOption = Annotated[str, Help(DATA_HELP, DATA)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all have in common."""

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Builds the options. Raises UserError for an unknown name, with the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"unknown option '{name}'{nearest(name, known)}; the options are {', '.join(known)}")
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What `fit` and `run_study` have in common.

    Raises:
        UserError: a count below 1, or an unknown place.
    """

    data: DataOption
    overrides: Annotated[
        tuple[str, ...],
        Help("Changes to the preset, such as student.recipe.epochs=10.", TRAINING, positional=True),
    ] = ()
    preset: Annotated[
        str | None,
        Help("A name from 'coadvise presets' or a YAML file. Default: chosen by the size of the images.", TRAINING),
    ] = None
    seed: Annotated[
        int | None, Help("Seed of the teachers and of the first student. Default: the preset's.", TRAINING)
    ] = None
    seeds: Annotated[
        int, Help("Number of students of each kind, at consecutive seeds. They share the teachers.", TRAINING)
    ] = 1
    jobs: Annotated[
        str,
        Help(
            "Number of networks to train at the same time, each in its own process with its share of the cores. auto: "
            "one a core, or one a GPU.",
            TRAINING,
        ),
    ] = AUTO
    on: Annotated[
        str,
        Help(
            "Where networks are trained: local, ray (the cluster of RAY_ADDRESS or of this machine, else a new one "
            "here), ray://HOST:PORT, or slurm. Each is a task there with engine.cpus and engine.gpus.",
            TRAINING,
        ),
    ] = LOCAL
    reuse: Annotated[
        Path | None,
        Help("A finished run on the same images. Networks with the same configuration are copied from it.", TRAINING),
    ] = None
    out: Annotated[
        Path | None,
        Help(
            "Output folder. An existing run or study continues. Default: runs/DATA-PRESET-seedN for fit, studies/DATA "
            "for a study.",
            OUTPUT,
        ),
    ] = None
    allow_changes: Annotated[
        bool,
        Help(
            "Continue although the configuration or the images changed. Finished networks stay after a change of the "
            "configuration; they are trained or scored again after a change of the images.",
            OUTPUT,
        ),
    ] = False

    def __post_init__(self) -> None:
        """Accepts paths as text, data as a path, and overrides as a list."""
        overrides = (self.overrides,) if isinstance(self.overrides, str) else tuple(self.overrides)
        self._set(data=str(self.data), overrides=overrides, reuse=_path(self.reuse), out=_path(self.out))
        self._set(jobs=str(self.jobs))
        _check_place(self.on)
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds}; give 1 or more")
        if self.jobs != AUTO and not (self.jobs.isdecimal() and int(self.jobs)):
            raise UserError(f"jobs={self.jobs}; give 1 or more, or {AUTO}")

    @property
    def given_jobs(self) -> int | None:
        """The number of networks to train at the same time; None for auto."""
        return None if self.jobs == AUTO else int(self.jobs)


@dataclass(frozen=True, kw_only=True)
class FitOptions(RunOptions):
    """The options of `fit`."""

    baseline: Annotated[
        bool, Help("Also train the same student on the same views without teachers, and compare.", TRAINING)
    ] = False
    cache: Annotated[
        Path | None,
        Help(
            "Folder of stored teacher logits. Missing ones are computed first; students then learn from the stored "
            "logits (float16), and no teacher runs during their training. Default: RUN/cache if the preset has a "
            "cache, else none.",
            TRAINING,
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(cache=_path(self.cache))


@dataclass(frozen=True, kw_only=True)
class StudyOptions(RunOptions):
    """The options of `run_study`."""

    name: Annotated[str, Help("A name from 'coadvise studies'.", DATA)]
    data: DataOption = "digits"
    cache: Annotated[
        bool, Help("Store the teachers' logits, so that students with the same views share them.", TRAINING)
    ] = False
    networks: Annotated[
        str,
        Help(
            "preset: the preset's networks stand in for the paper's. paper: the paper's own networks, at the preset's "
            "image size.",
            TRAINING,
        ),
    ] = "preset"
    weights: Annotated[
        str | None,
        Help(
            "Score given weights of the paper's networks instead of training them: a folder of files such as "
            "resnet50.pth, or 'pretrained' for timm's. For ImageNet's classes only.",
            TRAINING,
        ),
    ] = None
    shifts: Annotated[
        tuple[str, ...],
        Help(
            "Also score on this folder (ImageNet-A, -R, -C, or one like DATA). Repeat it for several.", DATA, "--shift"
        ),
    ] = ()

    paper_rows: Annotated[bool, Help("Only the paper's rows, without those beyond the paper.", TRAINING)] = False
    so_far: Annotated[bool, Help("Train nothing; show the results of the networks that are finished.", OUTPUT)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache and self.on != LOCAL:
            raise UserError(
                f"on={self.on} with cache: the runs of a study share stored logits by locks of files, which a network "
                "disk may not keep; leave out one of them"
            )
        self._set(shifts=(self.shifts,) if isinstance(self.shifts, str) else tuple(self.shifts))
        if self.networks not in NETWORKS:
            raise UserError(f"networks={self.networks}{nearest(self.networks, NETWORKS)}; give {' or '.join(NETWORKS)}")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """The options of `plan`."""

    preset: Annotated[str | None, Help("A name from 'coadvise presets' or a YAML file.", TRAINING, positional=True)] = (
        None
    )
    overrides: Annotated[
        tuple[str, ...],
        Help("Changes to the preset, such as student.recipe.epochs=10.", TRAINING, positional=True),
    ] = ()
    images: Annotated[int | None, Help("Number of training images.", DATA)] = None
    classes: Annotated[int, Help("Number of classes.", DATA)] = 1000
    pixels: Annotated[int | None, Help("Side of the images. Default: the preset's.", DATA)] = None
    seeds: Annotated[int, Help("Number of students of each kind.", TRAINING)] = 1
    baseline: Annotated[bool, Help("Also the student without teachers.", TRAINING)] = False
    gpu: Annotated[str | None, Help("A GPU by its name. Default: this machine, as it was measured.", MACHINE)] = None
    gpus: Annotated[int | None, Help("GPUs of each node, which train a network together.", MACHINE)] = None
    nodes: Annotated[int, Help("Number of machines.", MACHINE)] = 1
    network: Annotated[float, Help("What a node sends to another, Gbit/s.", MACHINE)] = 100.0
    gpu_tflops: Annotated[float | None, Help("An unlisted GPU: dense TFLOP/s.", MACHINE)] = None
    gpu_memory: Annotated[float | None, Help("An unlisted GPU: memory, GB.", MACHINE)] = None
    gpu_bandwidth: Annotated[float | None, Help("An unlisted GPU: bandwidth of its memory, GB/s.", MACHINE)] = None
    calibrate: Annotated[
        bool, Help("Measure this machine first, about two minutes; kept for later plans.", MACHINE)
    ] = False
    calibration: Annotated[
        Path | None,
        Help("File of a calibration, to plan for the machine it was made on, or to write.", MACHINE),
    ] = None


def described(options: type[Options]) -> list[tuple[Field[Any], Any, Help]]:
    """Every option in the order of the help: its field, its type and its help text. Positional ones come first."""
    hints = get_type_hints(options, include_extras=True)
    found = [(field, hints[field.name].__origin__, hints[field.name].__metadata__[0]) for field in fields(options)]
    return sorted(found, key=lambda option: (option[0].default is not MISSING, not option[2].positional))


def help_text(options: type[Options]) -> str:
    """The options as a section of a docstring."""
    lines = [f"        {field.name}: {about.text}" for field, _, about in described(options)]
    return "\n".join(["\n    Options:", *lines, ""])


def _check_place(on: str) -> None:
    """Raises UserError for a place that does not exist, or whose extra is not installed."""
    if on not in PLACES and not re.fullmatch(r"ray://[^\s/:]+:\d+", on):
        raise UserError(f"on={on}{nearest(on, PLACES)}; give local, ray, ray://HOST:PORT or slurm")
    extra = on.partition(":")[0]
    package = {RAY: "ray", SLURM: "submitit"}.get(extra)
    if package and find_spec(package) is None:
        raise UserError(f"on={on} needs the package {package}: pip install 'coadvise[{extra}]'")


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
