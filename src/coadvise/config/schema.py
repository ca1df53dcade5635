"""The configuration of a run: typed, frozen, complete."""

import re
from collections.abc import Mapping, Sequence
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
    model_serializer,
    model_validator,
)

from coadvise.advice import AVERAGE, CLASS, Advice, LossWeights, check_names
from coadvise.errors import UserError


class _Section(BaseModel):
    """Base of all sections. Keys in `_unwritten` are left out of the file while they have their default.

    Studies find their runs by a hash of what is written, including runs from before these keys existed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _unwritten: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_defaults(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = written(self)
        fields = type(self).model_fields
        default = {key for key in self._unwritten if getattr(self, key) == fields[key].default}
        return {key: value for key, value in values.items() if key not in default}


Classes = tuple[str, ...] | dict[str, tuple[str, ...]]


def _classes(given: object) -> object:
    """Sorted, as the folders and the labels are: the order in which classes are listed has no effect."""
    if isinstance(given, Mapping):
        given = {str(new): (old,) if isinstance(old, str) else old for new, old in given.items()}
        names = [name for olds in given.values() for name in (olds if isinstance(olds, list | tuple) else (olds,))]
    elif isinstance(given, list | tuple):
        names = list(given)
    else:
        raise ValueError("give a list of classes, or a mapping such as {bin: [trash, metal], paper: [paper]}")
    if not all(isinstance(name, str) for name in names):
        raise ValueError("class names are text; put quotes around numbers")
    if len({*given}) == 1:
        raise ValueError("at least two classes are needed; leave it empty to use all")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} listed more than once")
    return (
        {new: tuple(sorted(given[new])) for new in sorted(given)} if isinstance(given, dict) else tuple(sorted(names))
    )


def _depth(given: object) -> object:
    """Checked before pydantic's union of types, whose errors name every type."""
    if given in (None, "top", "leaf") or (type(given) is int and given > 0):
        return given
    raise ValueError("give top, leaf, or a level such as 2")


ImageSize = int | tuple[int, int]  # pixels: the side of a square, or height and width where they differ
Fit = Literal["crop", "pad", "stretch"]
FEWEST_PIXELS, MOST_PIXELS = 8, 1024  # of a side


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an image size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def plain_size(size: int | Sequence[int]) -> int | list[int]:
    """An image size as JSON and YAML hold it: a number for a square, else [height, width]."""
    height, width = sides(size)
    return height if height == width else [height, width]


def size_text(size: int | Sequence[int]) -> str:
    """An image size as the user reads it: "224", or "64 x 256", the height first."""
    height, width = sides(size)
    return str(height) if height == width else f"{height} x {width}"


def _image_size(given: object) -> ImageSize:
    """Checked before pydantic's union of types, whose errors name every type; a pair of equal sides is a square."""
    pair = tuple(given) if isinstance(given, list | tuple) else (given, given)
    if len(pair) != 2 or not all(isinstance(side, int | float) and float(side).is_integer() for side in pair):
        raise ValueError("give the side of a square in pixels, or [height, width]")
    height, width = (int(side) for side in pair)
    if not FEWEST_PIXELS <= min(height, width) <= max(height, width) <= MOST_PIXELS:
        raise ValueError(f"a side has {FEWEST_PIXELS} to {MOST_PIXELS} pixels")
    return height if height == width else (height, width)


class DataConfig(_Section):
    """Which images, at what size, and how a folder without splits is divided."""

    _unwritten: ClassVar[frozenset[str]] = frozenset({
        "classes", "exclude", "splits", "depth", "image_column", "label_column", "split_column", "root",
        "balance", "class_weights", "fit", "per_class", "views", "window", "cache_gb",
    })  # fmt: skip
    source: str = Field(
        "",
        description="data folder, a table, hf:NAME, shards:URL, or digits; given on the command line",
    )
    classes: Annotated[Classes, BeforeValidator(_classes)] = Field(
        (), description="classes to use; a mapping also merges and renames: {bin: [trash, metal]}; empty uses all"
    )
    exclude: tuple[str, ...] = Field((), description="classes or labels to leave out")
    splits: dict[Literal["train", "val", "test"], str] = Field(
        {}, description="which folder or value of the split column is which; empty: by their usual names"
    )
    depth: Annotated[Literal["top", "leaf"] | int | None, BeforeValidator(_depth)] = Field(
        None, description="which folders are classes: the top ones (default), those that hold the images, or a level"
    )
    image_column: str = Field("", description="tables and datasets: the column of images; empty: by its usual names")
    label_column: str = Field("", description="tables and datasets: the column of labels; empty: by its usual names")
    split_column: str = Field(
        "", description="tables and datasets: the column of splits; empty: by its usual names, if there is one"
    )
    root: str = Field("", description="tables: the folder of the images; empty: beside the table")
    balance: Literal["none", "loss", "sampler"] = Field(
        "none",
        description="classes of unequal size: weigh the cross-entropy against the labels, or show rare ones more often",
    )
    class_weights: Literal["auto"] | dict[str, Annotated[float, Field(gt=0)]] = Field(
        "auto", description="how much each class counts with balance; auto: all the same, whatever their size"
    )
    image_size: Annotated[ImageSize, BeforeValidator(_image_size)] = Field(
        32, description="pixels: the side of a square, or [height, width]"
    )
    fit: Fit = Field(
        "crop",
        description="images of another shape than image_size: crop cuts off what hangs over, pad keeps all of the "
        "image on a grey ground, stretch distorts it",
    )
    val_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of each class held out where the folder has no split"
    )
    per_class: int | None = Field(
        None,
        ge=1,
        description="at most so many training images of each class, chosen by the seed; null: all",
    )
    workers: int = Field(0, ge=0, description="loader processes, at most one a core; 0 loads in the training process")
    max_unreadable: float = Field(
        0.1, ge=0, le=1, description="largest share of unreadable files in a split; with more of them the run ends"
    )
    presize: int = Field(
        0,
        ge=0,
        description="deit only; shorter side, pixels, of the decoded training images kept on disk; 0 keeps none",
    )
    views: Literal["auto", "cpu", "device"] = Field(
        "cpu",
        description="deit only; where views of presized images are made: cpu, one at a time in loader processes; "
        "device, in batches where the networks are; auto: device if that is a CUDA device",
    )
    window: int = Field(
        16, ge=1, description="shards: how many of them are shuffled together; with all, the order is a folder's"
    )
    cache_gb: float = Field(
        50, gt=0, description="shards: GB of each node's disk for those that are fetched from elsewhere"
    )

    def elsewhere(self) -> "DataConfig":
        """The same classes and columns in other data, which may have other splits."""
        return self.model_copy(update={"splits": {}, "root": ""})

    @model_validator(mode="after")
    def _large_enough(self) -> "DataConfig":
        if 0 < self.presize < max(sides(self.image_size)):
            side = "the longer side of " * (not isinstance(self.image_size, int))
            raise ValueError(
                f"presize must be 0, or at least {side}the image_size of {size_text(self.image_size)} pixels"
            )
        return self

    @model_validator(mode="after")
    def _bytes_for_the_device(self) -> "DataConfig":
        if self.views == "device" and not self.presize:
            raise ValueError("views=device needs presized images; give presize too, such as 288, or views=auto")
        return self


def _shares(given: tuple[float, float]) -> tuple[float, float]:
    if not 0 < given[0] <= given[1] <= 1:
        raise ValueError("give two shares of the area above 0 and at most 1, the smaller first")
    return given


class AugmentConfig(_Section):
    """How training views are made.

    `deit` decodes each file for every view and applies a random resized crop, flip and RandAugment as DeiT does.
    `light` keeps all images decoded in memory at `image_size`, and shifts, zooms, rotates, flips and recolours a whole
    batch at once.
    """

    kind: Literal["light", "deit", "none"] = Field("light", description="see above; none leaves images as they are")
    rand_augment: str = Field("rand-m9-mstd0.5-inc1", description="deit only; timm's notation")
    crop_scale: Annotated[tuple[float, float], AfterValidator(_shares)] = Field(
        (0.08, 1.0), description="deit only; share of the area"
    )
    flip: bool = Field(True, description="mirror left and right with probability 1/2")
    shift: float = Field(0.125, ge=0, le=0.5, description="light only; at most this share of the side")
    zoom: float = Field(0.0, ge=0, lt=1, description="light only; the side is scaled by up to 1 ± this")
    rotate: float = Field(0.0, ge=0, le=180, description="light only; degrees, in both directions")
    colour: float = Field(
        0.0, ge=0, lt=1, description="light only; brightness, contrast and saturation by up to 1 ± this"
    )
    erase: float = Field(0.0, ge=0, le=1, description="probability of erasing a rectangle")
    mixup: float = Field(0.0, ge=0, description="alpha of Beta; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha of Beta; 0 is off")
    mix_probability: float = Field(1.0, ge=0, le=1, description="share of image pairs that are mixed")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    recycle: int = Field(
        0, ge=0, description="epoch e repeats the views and their order of epoch e mod this; 0: new views every epoch"
    )

    @property
    def unmixed(self) -> "AugmentConfig":
        """The same without mixing and erasing."""
        return self.model_copy(update={"mixup": 0.0, "cutmix": 0.0, "erase": 0.0})


class RecipeConfig(_Section):
    """How one network is trained (AdamW, cosine with warm-up)."""

    epochs: int = Field(30, ge=1, description="passes over the training images")
    batch_size: int = Field(128, ge=1, description="images per optimiser step, over all processes and micro-batches")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimiser step")
    learning_rate: float = Field(1e-3, gt=0, description="its peak")
    min_learning_rate: float = Field(1e-5, ge=0, description="end of the cosine")
    warmup_epochs: float = Field(3.0, ge=0, description="first epochs, in which the learning rate rises linearly")
    weight_decay: float = Field(0.05, ge=0, description="of all weights but biases, norms, tokens and positions")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="of AdamW"
    )
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 is off")
    ema: float = Field(0.0, ge=0, lt=1, description="decay per step of the averaged weights; 0 is off")
    evaluations: int = Field(10, ge=1, description="how many times the validation images are scored during training")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="a block's learning rate over the next one's; 1 is the same for all"
    )
    head_epochs: int = Field(
        0, ge=0, description="first epochs, in which only heads and the student's tokens are trained"
    )

    _unwritten: ClassVar[frozenset[str]] = frozenset({"layer_decay", "head_epochs"})


class ModelConfig(_Section):
    """A network by its timm name, and constructor arguments besides class count and image size."""

    model: str = Field(description="a name from coadvise models, or of timm")
    model_kwargs: dict[str, JsonValue] = Field(
        {}, description="arguments of its constructor, besides the number of classes and the image size"
    )


def _token_name(name: str) -> str:
    if taken := {AVERAGE: "the average of all tokens", "total": "the sum of all losses"}.get(name):
        raise ValueError(f"a teacher's name is that of its token, and '{name}' is {taken}")
    try:
        return check_names([name])[0]
    except UserError as error:
        raise ValueError(f"a teacher's name is that of its token: {error}") from None


def _advised_tokens(given: object) -> object:
    """Checked before pydantic's union of types, whose errors name every type."""
    if given is not None:
        _tokens(given, ", or null for the token with the teacher's name")
    return given


def _label_tokens(given: object) -> tuple[str, ...]:
    names = _tokens(given)
    if CLASS not in names:
        raise ValueError("class must be among them; with student.weight=0 no token learns from the labels")
    return names


def _start(given: object) -> object:
    if given is not None and not isinstance(given, bool | str):
        raise ValueError("give true, the name of a model in timm, a file, a run, or null")
    return None if given is False else given


def _tokens(given: object, otherwise: str = "") -> tuple[str, ...]:
    names = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"give a token's name, a list of names{otherwise}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} listed more than once")
    for name in names:
        if name != CLASS:
            _token_name(name)
    return names


class FinetuneConfig(_Section):
    """How a teacher that starts from other weights is fine-tuned.

    Weight decay, betas and micro-batches are its recipe's. Warm-up takes half an epoch, the gradient norm is at most 1
    unless the recipe clips, and weights are not averaged.
    """

    epochs: int | None = Field(None, ge=1, description="null: 15,000 images' worth, at least 5 and at most 30")
    batch_size: int = Field(32, ge=1, description="images per optimiser step; small, since there are few steps")
    learning_rate: float = Field(1e-3, gt=0, description="its peak, of the head")
    layer_decay: float = Field(0.9, gt=0, le=1, description="a layer's learning rate over the next one's")
    head_epochs: int = Field(1, ge=0, description="first epochs, in which only the head is trained")

    def recipe(self, recipe: RecipeConfig, images: int) -> RecipeConfig:
        """A recipe for fine-tuning on some training images."""
        epochs = self.epochs or min(30, max(5, round(15_000 / images)))
        return recipe.model_copy(
            update={
                "epochs": epochs, "batch_size": self.batch_size, "learning_rate": self.learning_rate,
                "layer_decay": self.layer_decay, "head_epochs": min(self.head_epochs, epochs - 1),
                "warmup_epochs": 0.5, "clip": recipe.clip or 1.0, "ema": 0.0,
                "evaluations": min(recipe.evaluations, epochs),
            }
        )  # fmt: skip


WEIGHT_FILES = (".pt", ".pth", ".safetensors", ".bin")  # what PyTorch and safetensors write
PYTHON = "python_"  # prefix of a model that is a module given from Python (`models/module.py`)
HUB = "hf-hub:"  # prefix of a model whose configuration and weights timm downloads from a hub


def names_model(start: str) -> bool:
    """Whether a start is the name of a model in timm or on a hub, and not a file or folder."""
    return start.startswith(HUB) or bool(re.fullmatch(r"\w+(\.\w+)?", start) and not start.endswith(WEIGHT_FILES))


def names_folder(start: str) -> bool:
    """Whether a start is a run, or the folder of a network, by its form alone."""
    return not names_model(start) and not start.endswith(WEIGHT_FILES)


class TeacherConfig(ModelConfig):
    """One teacher (its key is its name): its source, and which tokens it advises, and how."""

    _unwritten: ClassVar[frozenset[str]] = frozenset({"start", "adapt", "finetune"})
    recipe: RecipeConfig = RecipeConfig()
    start: str | None = Field(
        None,
        description="trained elsewhere: a model of timm with published weights, hf-hub:ORG/NAME, a file of weights, or "
        "a run or one of its networks; null: random weights",
    )
    adapt: Literal["finetune", "probe", "none"] | None = Field(
        None,
        description="a start gets a head for the data's classes, and all of it is trained (finetune) or the head alone "
        "(probe); none keeps its classes, which must be the data's; null: none for a run's, else finetune",
    )
    finetune: FinetuneConfig = FinetuneConfig()
    token: Annotated[str | tuple[str, ...] | None, BeforeValidator(_advised_tokens)] = Field(
        None,
        description="the student's token that it advises (class is one too), or a list; null: the token with its name",
    )
    weight: float = Field(1.0, ge=0, description="λ of Eq. (1)")
    temperature: float = Field(1.0, gt=0, description="τ of Eq. (1)")
    hard: bool = Field(False, description="cross-entropy against its most likely class instead of the KL term")
    augment: AugmentConfig | None = Field(None, description="views it is trained on; null: those of the run")

    @model_validator(mode="before")
    @classmethod
    def _model_of_start(cls, values: Any) -> Any:
        start = values.get("start") if isinstance(values, dict) else None
        if not isinstance(start, str) or not names_model(start):
            return values
        if values.get("model", start) != start:
            raise ValueError(f"model is {values['model']} and start is {start}; leave out model")
        return {**values, "model": start}

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Self:
        if self.start is None and self.adapt is not None:
            raise ValueError(f"adapt={self.adapt} needs a start, such as start=resnet18.a1_in1k; leave it out")
        return self

    @property
    def adaptation(self) -> str:
        """What `adapt` means: "finetune", "probe" or "none"; without a start "train"."""
        if self.start is None:
            return "train"
        return self.adapt or ("none" if names_folder(self.start) else "finetune")

    @property
    def trained_here(self) -> bool:
        """Whether it is trained in this run, from whatever weights."""
        return self.adaptation != "none"


class StudentConfig(ModelConfig):
    """The student, its recipe, λ_0, and how several teachers on one token are combined."""

    recipe: RecipeConfig = RecipeConfig()
    weight: float = Field(1.0, ge=0, description="λ_0 of Eq. (1), on the cross-entropy against the labels")
    label_tokens: Annotated[tuple[str, ...], BeforeValidator(_label_tokens)] = Field(
        (CLASS,), description="tokens that learn from the labels: class, and any others"
    )
    combine: Literal["sum", "mean"] = Field(
        "sum", description="several teachers on one token: one KL term each, or one to their mean"
    )
    standardise: bool = Field(
        False, description="the KL terms compare logits of mean 0 and deviation 1 over the classes"
    )
    start: Annotated[str | Literal[True] | None, BeforeValidator(_start)] = Field(
        None,
        description="weights to start from: true (timm's of the model), a name in timm, a file, a run; null: random",
    )

    _unwritten: ClassVar[frozenset[str]] = frozenset({"start", "label_tokens", "standardise"})


class CacheConfig(_Section):
    """How teachers' logits are stored: float16, and only the largest if there are many classes."""

    top_k: int = Field(
        32,
        ge=1,
        description="largest logits kept of an image, the others share one value; all are kept if that is no larger",
    )


class EngineConfig(_Section):
    """Device and precision."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is such a device")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16 is autocast, with the loss in float32; auto uses it if the processor has it natively",
    )
    compile: bool = Field(False, description="torch.compile the student and the teachers")
    deterministic: bool = Field(
        False, description="CUDA: only deterministic algorithms, which are slower; a CPU is always deterministic"
    )
    checkpoint_seconds: float = Field(
        60.0,
        ge=0,
        description="seconds between checkpoints, at least 50 times as long as one takes; 0 saves after each epoch",
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="several processes: seconds that one waits for another before the run ends"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), description="also tell these of the run; each needs the extra of its name"
    )

    cpus: int | None = Field(
        None, ge=1, description="processors, and threads, of a network on a cluster (--on); null: 1, or with a GPU one "
        "more than data.workers",
    )  # fmt: skip
    gpus: int | None = Field(
        None, ge=0, le=1, description="GPUs of a network on a cluster (--on); null: 1 if there is one here"
    )

    _unwritten: ClassVar[frozenset[str]] = frozenset({"trackers", "cpus", "gpus"})


class RunConfig(_Section):
    """Everything that decides a run's results. Written to `config.yaml` in the run directory."""

    seed: int = Field(0, ge=0, lt=2**31, description="decides initial weights, order, views and dropout")
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    teachers: dict[Annotated[str, AfterValidator(_token_name)], TeacherConfig] = Field(min_length=1)
    student: StudentConfig
    cache: CacheConfig | None = Field(
        None, description="students are advised by stored logits (--cache); null: teachers run in every step"
    )
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _cache_has_one_view_a_picture(self) -> Self:
        if self.cache is not None and self.data.balance == "sampler":
            raise ValueError(
                "data.balance=sampler shows some images several times an epoch, mixed with others each time, and a "
                "logit cache keeps one answer an image; use data.balance=loss, or leave out --cache"
            )
        return self

    @model_validator(mode="after")
    def _advice_fits_together(self) -> Self:
        self.loss_weights  # noqa: B018  (raises if teachers of one token cannot be combined)
        return self

    @property
    def in_memory(self) -> bool:
        """Whether all images are kept decoded in memory, as light views need it."""
        kinds = {self.augment.kind} | {t.augment.kind for t in self.teachers.values() if t.augment}
        return "deit" not in kinds

    @property
    def loss_weights(self) -> LossWeights:
        """λ and τ of Eq. (1)."""
        advice = {
            name: Advice(teacher.weight, teacher.temperature, teacher.token or "", teacher.hard)
            for name, teacher in self.teachers.items()
        }
        student = self.student
        return LossWeights(student.weight, advice, student.combine == "mean", student.label_tokens, student.standardise)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The student's tokens besides the class token."""
        return self.loss_weights.tokens

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
