"""A model together with what it needs to answer for an image: its normalisation and its class names."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.config import ModelConfig, nearest
from coadvise.errors import UserError
from coadvise.models import STUDENTS, TokenModel
from coadvise.storage import MANIFEST, read_model, write_model

HUB = "hf-hub:"  # before the name of a model that timm fetches, its configuration and its weights
_STUDENTS = f"; students are {', '.join(STUDENTS)}"
# What timm would fetch or open files for, and what is decided by classes, tokens and weights.
_NOT_ARGUMENTS = frozenset({
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir",
    "num_classes", "features_only",
})  # fmt: skip


class _About(BaseModel):
    """What a manifest says of a network; it may come from anybody."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str
    model_kwargs: dict[str, JsonValue]
    classes: list[str] = Field(min_length=1)
    image_size: int = Field(ge=1, le=4096)
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]


class Network(nn.Module):
    """Images [B, 3, H, W] in 0..1 to logits by token; a model without tokens answers as "class" alone.

    Args:
        model: a timm model, of which a `TokenModel` answers by every token.
        about: its name, arguments and classes, as `build_network` makes it and the manifest keeps it.
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
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def fixed_image_size(self) -> bool:
        """Whether the model takes images of `about["image_size"]` pixels and no others."""
        return _takes_image_size(self.about["model"])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = (images - self.mean) / self.std
        if isinstance(self.model, TokenModel):
            return self.model.forward_tokens(x)
        return {CLASS: self.model(x)}

    def for_inference(self) -> "Network":
        """A frozen copy in evaluation mode with "class" logits alone; a student is faster, equal to float error."""
        model = self.model.for_inference() if isinstance(self.model, TokenModel) else copy.deepcopy(self.model)
        return Network(model, self.about).to(self.mean.device).requires_grad_(False).eval()

    def save(self, folder: Path) -> None:
        write_model(folder, self.model.state_dict(), self.about)


def build_network(
    config: ModelConfig,
    classes: Sequence[str],
    image_size: int,
    seed: int,
    tokens: Sequence[str] | None = None,
    pretrained: bool = False,
) -> Network:
    """Makes a network by its timm name, its weights a function of `seed`.

    Args:
        tokens: the names of the student's tokens beside the class token; None for a teacher.

    Raises:
        UserError: no such model, a student without tokens, arguments it does not take, or published weights that cannot
            be fetched.
    """
    arguments = dict(config.model_kwargs)
    if tokens is not None:
        arguments["token_names"] = list(tokens)
    about = {"model": config.model, "model_kwargs": arguments, "classes": list(classes), "image_size": image_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create_network(about, config.model if pretrained else None)
    if tokens is not None and not isinstance(network.model, TokenModel):
        raise UserError(f"model '{config.model}' has no tokens for teachers to advise{_STUDENTS}")
    return network


def load_network(folder: Path) -> Network:
    """Reads a network that `Network.save` wrote, or anybody else: nothing in it is executed or fetched.

    Raises:
        UserError: there is none, it is damaged, or it is not of a network that can be made here.
    """
    manifest, weights = read_model(folder)
    try:
        about = _About.model_validate(manifest).model_dump()
        network = create_network(about)
    except UserError as error:
        raise UserError(f"'{folder}': {error}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"'{folder / MANIFEST}': '{where}': {fault['msg']}; it describes no network") from None
    load_weights(network, weights, folder)
    return network.eval()


def class_map(known: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Where the wanted classes stand among the known ones, by name; None where not every one of them is known."""
    place = {name: number for number, name in enumerate(known)}
    return [place[name] for name in wanted] if place.keys() >= set(wanted) else None


def check_name(model: str) -> None:
    """Raises UserError for what is no model of timm's registry, or for weights that timm does not have of it."""
    if not timm.is_model(model):
        hub = "; one of a hub is a teacher with pretrained=true" if model.startswith(HUB) else ""
        raise UserError(f"unknown model '{model}'{nearest(model, timm.list_models())}; see 'coadvise models'{hub}")
    try:
        timm.get_pretrained_cfg(model)
    except RuntimeError:
        architecture = model.partition(".")[0]
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise UserError(f"unknown weights '{model}'; of {architecture} timm has {tags}") from None


def create_network(about: dict[str, Any], source: str | None = None) -> Network:
    """Makes what `about` describes, with weights as they fall, or as timm fetches them by a name of its own or a hub's.

    Raises:
        UserError: no such model, arguments it does not take, or weights that cannot be had.
    """
    check_name(about["model"])  # timm would take "hf-hub:" and "local-dir:" names as well, and go there
    arguments = dict(about["model_kwargs"])
    if forbidden := sorted(_NOT_ARGUMENTS & arguments.keys()):
        raise UserError(f"model_kwargs of '{about['model']}' may not hold {', '.join(forbidden)}; leave that out")
    if _takes_image_size(about["model"]):
        arguments["img_size"] = about["image_size"]
    try:
        model = timm.create_model(
            source or about["model"], pretrained=source is not None, num_classes=len(about["classes"]), **arguments
        )
        settings = model.pretrained_cfg
        return Network(model, {"mean": list(settings["mean"]), "std": list(settings["std"]), **about})
    except OSError as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"the published weights of '{source}' cannot be had: {said}") from None
    except Exception as error:  # hundreds of constructors, each with faults of its own for what it does not take
        said = " ".join(str(error).split()) or type(error).__name__
        hint = _STUDENTS if "token_names" in said else ""
        raise UserError(f"model '{about['model']}' cannot be made with {arguments}: {said}{hint}") from None


def check_answers(network: Network, device: torch.device) -> None:
    """Raises UserError for a network that does not answer for its images: some arguments are found out only then."""
    size = network.about["image_size"]
    try:
        with torch.no_grad():
            network.to(device).eval()(torch.zeros(2, 3, size, size, device=device))
        network.for_inference()
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        arguments = network.about["model_kwargs"]
        raise UserError(
            f"model '{network.about['model']}' with {arguments} does not answer for images of {size} pixels: {said}"
        ) from None


def load_weights(network: Network, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Gives a network its weights, all of them. Raises UserError where they are another network's."""
    try:
        network.model.load_state_dict(weights)
    except RuntimeError as error:  # PyTorch lists every parameter; the first lines say enough
        said = " ".join(str(error).split())[:300]
        raise UserError(f"'{origin}': its weights are not those of '{network.about['model']}': {said}") from None


def _takes_image_size(name: str) -> bool:
    """Transformers and mixers are built for one image size, which timm marks; convolution networks take any."""
    settings = timm.get_pretrained_cfg(name)
    return settings is not None and settings.fixed_input_size
