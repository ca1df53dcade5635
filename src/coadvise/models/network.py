"""A model with its normalisation and its class names."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.config.reading import nearest
from coadvise.config.schema import HUB, PYTHON, Fit, ImageSize, ModelConfig, plain_size, sides, size_text
from coadvise.errors import CodeNotKeptError, UserError
from coadvise.models import TokenModel
from coadvise.models.token_vit import STUDENTS_ARE, create_token_vit, is_timms
from coadvise.storage import MANIFEST, read_model, write_model

# Arguments for which timm would download or open files, and those that follow from classes, tokens and weights.
_FORBIDDEN_ARGUMENTS = frozenset({
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir",
    "num_classes", "features_only",
})  # fmt: skip


_Side = Annotated[int, Field(ge=1, le=4096)]


class _About(BaseModel):
    """A network's manifest. It is checked, since the file may come from a stranger."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str
    model_kwargs: dict[str, JsonValue]
    classes: list[str] = Field(min_length=1)
    image_size: _Side | Annotated[list[_Side], Field(min_length=2, max_length=2)]
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    temperatures: dict[str, Annotated[float, Field(gt=0)]] | None = None
    fit: Fit = "crop"
    value_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None


class Network(nn.Module):
    """Maps images [B, 3, H, W] in 0..1 to logits by token; for a model without tokens the only one is "class".

    Args:
        model: A timm model; a `TokenModel` gives the logits of every token.
        about: Name, arguments, classes, image size and normalisation, as `build_network` makes them and the manifest
            stores them; and the temperature of each answer where it is calibrated (`evaluation/calibration.py`).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.about = model, dict(about)
        self.register_buffer("mean", torch.tensor(about["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(about["std"]).view(1, 3, 1, 1), persistent=False)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.about["classes"])

    @property
    def values(self) -> tuple[float, float] | None:
        """What becomes black and white in images of more than 8 bits; None: each image's own 8 or 16 bits."""
        span = self.about.get("value_range")
        return None if span is None else (span[0], span[1])

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def temperatures(self) -> dict[str, float]:
        """By answer, what logits are divided by for calibrated probabilities; empty if it is not calibrated."""
        return dict(self.about.get("temperatures", {}))

    @property
    def image_size(self) -> ImageSize:
        """Pixels: the side of a square, or (height, width)."""
        size = self.about["image_size"]
        return size if isinstance(size, int) else tuple(size)

    @property
    def fixed_image_size(self) -> bool:
        """Whether the model takes images of `image_size` pixels only."""
        return _takes_image_size(self.about["model"])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.normalised(images)
        if isinstance(self.model, TokenModel):
            return self.model.forward_tokens(x)
        return {CLASS: self.model(x)}

    def normalised(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 as the model takes them."""
        return (images - self.mean) / self.std

    def features(self, images: Tensor) -> Tensor:
        """What the class token's head is given of images [B, 3, H, W] in 0..1: [B, D]."""
        model: Any = self.model  # all of timm's have both methods
        return model.forward_head(model.forward_features(self.normalised(images)), pre_logits=True)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets the mean and deviation, of RGB in 0..1, that weights from elsewhere were trained with."""
        self.about |= {"mean": list(mean), "std": list(std)}
        self.mean.copy_(torch.tensor(self.about["mean"]).view_as(self.mean))
        self.std.copy_(torch.tensor(self.about["std"]).view_as(self.std))

    def for_inference(self) -> "Network":
        """A frozen copy in evaluation mode with "class" logits alone; a student is faster, equal to float error."""
        model = self.model.for_inference() if isinstance(self.model, TokenModel) else copy.deepcopy(self.model)
        return Network(model, self.about).to(self.mean.device).requires_grad_(False).eval()

    def save(self, folder: Path) -> None:
        write_model(folder, self.model.state_dict(), self.about)


def build_network(
    config: ModelConfig,
    classes: Sequence[str],
    image_size: ImageSize,
    seed: int,
    tokens: Sequence[str] | None = None,
    pretrained: bool = False,
) -> Network:
    """Builds a network by its timm name, with weights that are a function of `seed`.

    Args:
        tokens: Names of the student's tokens without the class token; None for a teacher.

    Raises:
        UserError: No such model, a student without tokens, unknown arguments, or published weights that could not be
            downloaded.
    """
    arguments = dict(config.model_kwargs)
    if tokens is not None:
        arguments["token_names"] = list(tokens)
    about = {
        "model": config.model,
        "model_kwargs": arguments,
        "classes": list(classes),
        "image_size": plain_size(image_size),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create_network(about, config.model if pretrained else None)
    if tokens is not None and not isinstance(network.model, TokenModel):
        raise UserError(f"model '{config.model}' has no tokens for teachers to advise; {STUDENTS_ARE}")
    _check_whole_patches(network)
    return network


def _check_whole_patches(network: Network) -> None:
    """Raises UserError for a transformer that would ignore a strip at the image's right or bottom, as timm's do."""
    body, size = getattr(network.model, "vit", network.model), sides(network.image_size)
    embed = getattr(body, "patch_embed", None)
    if embed is None or not getattr(embed, "strict_img_size", False) or embed.dynamic_img_pad:
        return
    below = [max(side // patch, 1) * patch for side, patch in zip(size, embed.patch_size, strict=True)]
    if list(size) != below:
        above = [low + patch * (low != side) for low, side, patch in zip(below, size, embed.patch_size, strict=True)]
        raise UserError(
            f"model '{network.about['model']}' has patches of {size_text(embed.patch_size)} pixels, which do not fill "
            f"images of {size_text(size)} pixels; set data.image_size to {plain_size(below)} or {plain_size(above)}, "
            "or another patch_size in its model_kwargs"
        )


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` builds, with shapes alone, on PyTorch's meta device."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # timm before 1.0.30 computes RegNets' widths as tensors
        return build().to("meta")


def load_network(folder: Path) -> Network:
    """Reads a network that `Network.save` wrote. Nothing in the files is executed, and nothing is downloaded.

    Raises:
        UserError: There is none, it is damaged, or its network cannot be built here; a `CodeNotKeptError` for a module
            that this process was not given.
    """
    manifest, weights = read_model(folder)
    about = checked_about(manifest, folder / MANIFEST)
    try:
        network = create_network(about)
    except CodeNotKeptError:
        raise
    except UserError as error:
        raise UserError(f"'{folder}': {error}") from None
    load_weights(network, weights, folder)
    return network.eval()


def checked_about(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """What `create_network` takes, from values that may come from a stranger. Raises UserError, which names `where`."""
    try:
        return _About.model_validate(values).model_dump(exclude_unset=True, exclude_none=True)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"'{where}': '{key}': {fault['msg']}; this does not describe a network") from None


def class_map(known: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """The index of each wanted class among the known ones, by name; None if one is not known."""
    place = {name: number for number, name in enumerate(known)}
    return [place[name] for name in wanted] if place.keys() >= set(wanted) else None


def check_name(model: str) -> None:
    """Raises UserError for a name that is not in timm's registry, or weights (the tag) that timm does not have."""
    if not timm.is_model(model) and model.startswith(PYTHON):
        raise CodeNotKeptError(
            f"'{model}' is a module that was given from Python; a run keeps its weights and not its code: give it "
            "again, coadvise.fit(..., teachers={NAME: module})"
        )
    if not timm.is_model(model):
        hub = "; a hub's model can only be a teacher's start" if model.startswith(HUB) else ""
        raise UserError(f"unknown model '{model}'{nearest(model, timm.list_models())}; see 'coadvise models'{hub}")
    try:
        timm.get_pretrained_cfg(model)
    except RuntimeError:
        architecture = model.partition(".")[0]
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise UserError(f"unknown weights '{model}'; of {architecture} timm has {tags}") from None


def create_network(about: dict[str, Any], source: str | None = None) -> Network:
    """Builds the network that `about` describes.

    Args:
        source: Name in timm or on a hub of the weights to download; None for randomly initialised weights.

    Raises:
        UserError: No such model, unknown arguments, or weights that could not be downloaded.
    """
    check_name(about["model"])  # timm would also accept "hf-hub:" and "local-dir:" names
    arguments = dict(about["model_kwargs"])
    if forbidden := sorted(_FORBIDDEN_ARGUMENTS & arguments.keys()):
        raise UserError(f"model_kwargs of '{about['model']}' must not contain {', '.join(forbidden)}; remove them")
    if _takes_image_size(about["model"]):
        size = about["image_size"]
        arguments["img_size"] = size if isinstance(size, int) else tuple(size)
    takes_tokens = "token_names" in arguments and is_timms(about["model"])
    try:
        model: Any
        if takes_tokens:
            model = create_token_vit(about["model"], num_classes=len(about["classes"]), **arguments)
        else:
            model = timm.create_model(
                source or about["model"], pretrained=source is not None, num_classes=len(about["classes"]), **arguments
            )
        settings = model.pretrained_cfg
        return Network(model, {"mean": list(settings["mean"]), "std": list(settings["std"]), **about})
    except OSError as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"the published weights of '{source}' could not be loaded: {said}; fetch them once where there is a "
            f"connection, coadvise fetch {source}, or give a file of them"
        ) from None
    except Exception as error:  # hundreds of constructors, each with its own errors
        if takes_tokens and isinstance(error, UserError):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        hint = f"; {STUDENTS_ARE}" if "token_names" in said else ""
        raise UserError(f"model '{about['model']}' cannot be built with {arguments}: {said}{hint}") from None


def check_answers(network: Network, device: torch.device) -> None:
    """Raises UserError for a network that fails on images of its size: some arguments fail only then."""
    height, width = sides(network.image_size)
    try:
        with torch.no_grad():
            network.to(device).eval()(torch.zeros(2, 3, height, width, device=device))
        network.for_inference()
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        arguments = network.about["model_kwargs"]
        raise UserError(
            f"model '{network.about['model']}' with {arguments} fails on images of "
            f"{size_text((height, width))} pixels: {said}"
        ) from None


def load_weights(network: Network, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Loads all weights of a network. Raises UserError if they belong to another network."""
    try:
        network.model.load_state_dict(weights)
    except RuntimeError as error:  # PyTorch lists every parameter; the first ones are enough
        said = " ".join(str(error).split())[:300]
        raise UserError(f"'{origin}': these are not weights of '{network.about['model']}': {said}") from None


def _takes_image_size(name: str) -> bool:
    """Whether a model is built for one image size, as timm says of transformers and mixers."""
    settings = timm.get_pretrained_cfg(name)
    return settings is not None and settings.fixed_input_size
