"""The configuration of a run: typed, frozen, complete; a preset or a YAML file plus `a.b=c` overrides."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from coadvise.advice import AVERAGE, CLASS, Advice, LossWeights, check_names
from coadvise.errors import UserError

MOST_YAML = 2**17  # bytes of a configuration, and things in it once YAML's aliases are written out


class _Part(BaseModel):
    """`_unwritten` keys are not written while they have their default.

    Studies find their runs by a hash of what is written, also the runs from before there were these keys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _unwritten: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_defaults(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = written(self)
        fields = type(self).model_fields
        default = {key for key in self._unwritten if getattr(self, key) == fields[key].default}
        return {key: value for key, value in values.items() if key not in default}


def _class_folders(names: tuple[str, ...]) -> tuple[str, ...]:
    """In the order of the folders, which is that of the labels: a run is the same however its classes are listed."""
    if len(set(names)) == 1:
        raise ValueError("at least two classes are needed, or none to use them all")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} listed more than once")
    return tuple(sorted(names))


class DataConfig(_Part):
    """Which images, how large, and how a folder without splits is divided."""

    _unwritten: ClassVar[frozenset[str]] = frozenset({"classes"})
    source: str = Field("", description="the data folder, or digits; given on the command line")
    classes: Annotated[tuple[str, ...], AfterValidator(_class_folders)] = Field(
        (), description="the class folders to use, for training and validation alike; none are named to use them all"
    )
    image_size: int = Field(32, ge=8, le=1024, description="pixels, square")
    val_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of each class held out where the folder has no split"
    )
    workers: int = Field(
        0, ge=0, description="loader processes, at most one a core; 0 makes views in the training process"
    )
    max_unreadable: float = Field(
        0.1, ge=0, le=1, description="share of a split's files that may be unreadable; more of them end the run"
    )
    presize: int = Field(
        0, ge=0, description="deit only; shorter side of the training images as kept decoded on disk; 0 keeps none"
    )

    @model_validator(mode="after")
    def _large_enough(self) -> "DataConfig":
        if 0 < self.presize < self.image_size:
            raise ValueError(f"presize must be 0, or at least the image_size of {self.image_size} pixels")
        return self


class AugmentConfig(_Part):
    """What a training view may look like.

    `deit` decodes each file anew and takes a random resized crop, flip and RandAugment as DeiT does; `light` keeps all
    images decoded in memory at `image_size` and moves, zooms, turns, flips and recolours a whole batch at once.
    """

    kind: Literal["light", "deit", "none"] = "light"
    rand_augment: str = Field("rand-m9-mstd0.5-inc1", description="deit only; timm's notation")
    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="deit only; share of the area")
    flip: bool = Field(True, description="mirror left and right half of the time")
    shift: float = Field(0.125, ge=0, le=0.5, description="light only; up to this share of the side")
    zoom: float = Field(0.0, ge=0, lt=1, description="light only; side scaled by 1 ± this")
    rotate: float = Field(0.0, ge=0, le=180, description="light only; degrees either way")
    colour: float = Field(0.0, ge=0, lt=1, description="light only; brightness, contrast, saturation by 1 ± this")
    erase: float = Field(0.0, ge=0, le=1, description="probability of erasing a rectangle")
    mixup: float = Field(0.0, ge=0, description="alpha of Beta; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha of Beta; 0 is off")
    mix_probability: float = Field(1.0, ge=0, le=1, description="share of pairs that are mixed at all")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    recycle: int = Field(
        0, ge=0, description="epoch e sees the views and the order of epoch e mod this; 0 is new views every epoch"
    )


class RecipeConfig(_Part):
    """How one network is trained (AdamW, cosine with warm-up)."""

    epochs: int = Field(30, ge=1)
    batch_size: int = Field(128, ge=1, description="images an optimiser step, over all processes and accumulation")
    accumulate: int = Field(1, ge=1, description="micro-batches an optimiser step")
    learning_rate: float = Field(1e-3, gt=0, description="peak")
    min_learning_rate: float = Field(1e-5, ge=0, description="floor of the cosine")
    warmup_epochs: float = Field(3.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 is off")
    ema: float = Field(0.0, ge=0, lt=1, description="decay a step of the averaged weights; 0 is off")
    evaluations: int = Field(10, ge=1, description="times the validation images are scored during training")


class ModelConfig(_Part):
    """A network by its timm name, and what its constructor gets beside class count and image size."""

    model: str
    model_kwargs: dict[str, JsonValue] = {}


def _token_name(name: str) -> str:
    if name == AVERAGE:
        raise ValueError("a teacher's name is its token's, and 'average' is the answer of all tokens together")
    try:
        return check_names([name])[0]
    except UserError as error:
        raise ValueError(f"a teacher's name is its token's: {error}") from None


def _advised_tokens(given: object) -> object:
    """Before the union of types is: its own errors name every type."""
    if given is None:
        return None
    names = given if isinstance(given, list | tuple) else (given,)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("give a token's name, a list of names, or null for that of the teacher's own name")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} listed more than once")
    for name in names:
        if name != CLASS:
            _token_name(name)
    return given


class TeacherConfig(ModelConfig):
    """One teacher (its key is its name), how it is had, and how it advises which token."""

    recipe: RecipeConfig = RecipeConfig()
    checkpoint: str | None = Field(
        None, description="folder of a teacher that another run trained, or a file of weights; null trains one here"
    )
    pretrained: bool = Field(
        False,
        description="published weights of a model of timm's or of a hub's (hf-hub:ORG/NAME); refused unless the "
        "classes agree",
    )
    token: Annotated[str | tuple[str, ...] | None, BeforeValidator(_advised_tokens)] = Field(
        None,
        description="the student's token it advises, class among them, or a list of several, each with λ and τ; null "
        "is that of its own name",
    )
    weight: float = Field(1.0, ge=0, description="λ of Eq. (1)")
    temperature: float = Field(1.0, gt=0, description="τ of Eq. (1)")
    hard: bool = Field(False, description="cross-entropy against its most likely class in place of the KL term")
    augment: AugmentConfig | None = Field(None, description="views it is trained on; null takes the run's")

    @property
    def trained_here(self) -> bool:
        return self.checkpoint is None and not self.pretrained


class StudentConfig(ModelConfig):
    """The student, its recipe, λ_0, and what several teachers on one token are to it."""

    recipe: RecipeConfig = RecipeConfig()
    weight: float = Field(1.0, ge=0, description="λ_0 of Eq. (1), on the class token's cross-entropy")
    combine: Literal["sum", "mean"] = Field(
        "sum", description="several teachers on one token: a KL term each, or one to their mean"
    )
    start: str | None = Field(
        None, description="file of weights to start from, a DeiT's or what 'coadvise convert' wrote; null starts anew"
    )

    _unwritten: ClassVar[frozenset[str]] = frozenset({"start"})


class CacheConfig(_Part):
    """The form in which teachers' logits are stored: float16, the largest ones where there are many classes."""

    top_k: int = Field(
        32,
        ge=1,
        description="logits kept of an answer, the others share one; all are kept where that takes no more room",
    )


class EngineConfig(_Part):
    """Where and in what precision it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16 is autocast, the loss stays float32; auto takes it where the processor has it natively",
    )
    compile: bool = Field(False, description="torch.compile of the student's and teachers' forward")
    deterministic: bool = Field(
        False, description="CUDA: only algorithms that give the same bits every time; slower. A CPU's always do"
    )
    checkpoint_seconds: float = Field(
        60.0,
        ge=0,
        description="seconds between checkpoints, at least 50 times as long as one takes; 0 saves after each epoch",
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="on several processes: how long one waits for another before the run ends"
    )
    tensorboard: bool = Field(False, description="also write TensorBoard events (needs the extra 'tensorboard')")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers that are told every record, by name."""
        return ("tensorboard",) if self.tensorboard else ()


class RunConfig(_Part):
    """Everything that decides a run's numbers; written as `config.yaml` in the run directory."""

    seed: int = Field(0, ge=0, lt=2**31)
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    teachers: dict[Annotated[str, AfterValidator(_token_name)], TeacherConfig] = Field(min_length=1)
    student: StudentConfig
    cache: CacheConfig | None = Field(
        None, description="students are advised by stored logits (--cache); null asks the teachers in every step"
    )
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _advice_fits_together(self) -> Self:
        self.loss_weights  # noqa: B018  (raises where teachers of one token cannot be combined)
        return self

    @property
    def in_memory(self) -> bool:
        """Whether all images are kept decoded: light views are made of whole batches of pixels."""
        kinds = {self.augment.kind} | {t.augment.kind for t in self.teachers.values() if t.augment}
        return "deit" not in kinds

    @property
    def loss_weights(self) -> LossWeights:
        """λ and τ of Eq. (1)."""
        advice = {
            name: Advice(teacher.weight, teacher.temperature, teacher.token or "", teacher.hard)
            for name, teacher in self.teachers.items()
        }
        return LossWeights(self.student.weight, advice, self.student.combine == "mean")

    @property
    def tokens(self) -> tuple[str, ...]:
        """The student's tokens beside the class token: those that teachers advise, each once, in their order."""
        return tuple(token for token in self.loss_weights.by_token if token != CLASS)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def preset_names() -> list[str]:
    """The names `load_config` takes."""
    return sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The YAML of a preset or a preset file, header included."""
    return (_presets() / f"{name}.yaml" if name in preset_names() else Path(name)).read_text()


def load_config(
    preset: str, overrides: Sequence[str] = (), seed: int | None = None, source: str | None = None
) -> RunConfig:
    """Reads a preset by name or a YAML file, applies `a.b=c` overrides, checks everything.

    Raises:
        UserError: all faults at once, each with what was given, what is allowed and the nearest name.
    """
    if preset in preset_names():
        path = _presets() / f"{preset}.yaml"
    elif not preset.endswith((".yaml", ".yml")):
        raise UserError(
            f"unknown preset '{preset}'{nearest(preset, preset_names())}; "
            f"there are {', '.join(preset_names())}, or give a file ending in .yaml"
        )
    elif not Path(preset).is_file():
        raise UserError(
            f"no preset file '{preset}'; give a YAML file, or one of the presets {', '.join(preset_names())}"
        )
    else:
        path = Path(preset)
    values = _read_yaml(path, f"preset '{preset}'")
    for override in sorted(overrides, key=lambda text: ".model=" not in text):  # models before their arguments
        _apply(values, override)
    if seed is not None:
        values["seed"] = seed
    if source is not None:
        _set(values, "data.source", source)
    config = parse_config(values)
    _check_intended(config)
    return config


def parse_arguments(overrides: Sequence[str]) -> dict[str, Any]:
    """`a=1`, `b.c=[2]` to a nested dict, values as YAML reads them. Raises UserError."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply(values, override)
    return values


def _check_intended(config: RunConfig) -> None:
    """Raises UserError for what is to be trained and cannot be meant; a run that has done so stays readable."""
    if not config.loss_weights.trains_class:
        raise UserError(
            "student.weight=0 takes the labels from the class token, which answers, and no teacher advises it; give "
            "student.weight a value above 0, or let a teacher advise it: teachers.NAME.token=[NAME, class]"
        )
    known = (*config.teachers, CLASS)
    for token, teachers in config.loss_weights.by_token.items():
        if token not in known and len(teachers) == 1 and (meant := nearest(token, known)):
            raise UserError(
                f"unknown token '{token}' of teachers.{teachers[0]}.token{meant}; a token that is new has a name less "
                f"like {', '.join(known)}, or is advised by two teachers"
            )
    networks = {"student": config.student, **{f"teachers.{name}": given for name, given in config.teachers.items()}}
    for part, network in networks.items():
        if "img_size" in network.model_kwargs:
            raise UserError(
                f"{part}.model_kwargs.img_size={network.model_kwargs['img_size']}: all networks see images of the same "
                "size; give it as data.image_size"
            )


def read_config(path: Path) -> RunConfig:
    """The configuration that a run left. Raises UserError as `load_config` does; nothing in the file is executed."""
    return parse_config(_read_yaml(path, f"'{path}'"))


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Checks a nested dict against `RunConfig`. Raises UserError with all faults at once."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_faults(error))) from None


def with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The same configuration with other values at dotted keys. Raises UserError as `parse_config`."""
    values = config.model_dump(mode="json")
    for path, value in changes.items():
        _set(values, path, value)
    return parse_config(values)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One line `a.b: old -> new` for every key in which two configurations differ."""
    return changes(old.model_dump(mode="json"), new.model_dump(mode="json"))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line `a.b: old -> new` for every value in which two nested dicts differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def nearest(given: str, allowed: Sequence[str]) -> str:
    """`, did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""


def _presets() -> Any:
    return resources.files("coadvise") / "presets"


def _read_yaml(path: Any, what: str) -> dict[str, Any]:
    """Keys and values of a YAML file of anybody's: plain data only, a tag that would make anything else is refused."""
    try:
        content = path.read_bytes()
        if len(content) > MOST_YAML:
            raise UserError(f"{what} has {len(content)} bytes, a configuration at most {MOST_YAML}")
        values = _unshared(yaml.safe_load(content), count())
    except UserError:
        raise
    except (
        OSError,
        yaml.YAMLError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # ValueError: a date of no calendar
        raise UserError(f"{what} is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(values, dict):
        raise UserError(f"{what} must hold keys and values, not {type(values).__name__}")
    return values


def _unshared(value: Any, things: Iterator[int]) -> Any:
    """A copy in which YAML's aliases are things of their own: an override of one must not change the other.

    Raises:
        ValueError: more than MOST_YAML of them, as nested aliases can make of a few lines.
    """
    if next(things) > MOST_YAML:
        raise ValueError("its aliases make too much of it")
    if isinstance(value, dict):
        return {key: _unshared(child, things) for key, child in value.items()}
    return [_unshared(child, things) for child in value] if isinstance(value, list) else value


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise UserError(f"'{override}' is not an override; write key=value, for instance student.recipe.epochs=10")
    try:
        value = yaml.safe_load(text)
        _unshared(value, count())
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise UserError(f"'{override}': the value is not YAML") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a word
        with suppress(ValueError):
            value = float(value)
    if path.endswith(".model"):  # the preset's arguments are those of the preset's model
        _set(values, f"{path}_kwargs", {})
    _set(values, path, value)


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, key = path.split(".")
    for parent in parents:
        if values.get(parent) is None:  # not there, or a key with nothing behind it
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"'{path}': '{parent}' holds a value, not keys")
    values[key] = value


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        where = [str(part) for part in fault["loc"] if part != "[key]"]
        name = ".".join(where) or "the configuration"
        if fault["type"] == "extra_forbidden":
            allowed = _keys_at(where[:-1])
            yield f"unknown key '{name}'{nearest(where[-1], allowed)}; allowed here: {', '.join(allowed)}"
        elif fault["type"] == "missing":
            yield f"'{name}' is missing"
        else:
            said = fault["msg"].removeprefix("Value error, ")
            yield f"'{name}' is {_short(fault['input'])}: {said}" if where else said


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _keys_at(path: Sequence[str]) -> list[str]:
    """The keys allowed at a place of the configuration."""
    model: type[BaseModel] = RunConfig
    rest = list(path)
    while rest:
        key = rest.pop(0)
        if model is RunConfig and key == "teachers":
            if not rest:
                return []
            rest.pop(0)
            model = TeacherConfig
            continue
        annotation = model.model_fields[key].annotation
        optional = {"augment": AugmentConfig, "cache": CacheConfig}
        model = optional.get(key, annotation)  # type: ignore[assignment,arg-type]
    return list(model.model_fields)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


# Keys that change no number: a run may be taken up with other ones.
FREE = (
    "data.workers",
    "data.max_unreadable",
    "engine.checkpoint_seconds",
    "engine.timeout_seconds",
    "engine.tensorboard",
)


def deciding_values(config: RunConfig) -> dict[str, Any]:
    """What a configuration says beside where the images are and what changes no number, in plain values."""
    values = config.model_dump(mode="json")
    for key in ("data.source", *FREE):
        group, _, name = key.partition(".")
        values[group].pop(name)
    return values
