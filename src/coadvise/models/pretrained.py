"""Networks trained elsewhere: timm's published weights, a model on a hub, a file of weights, another run's teacher.

Their classes must have names, since which of a thousand outputs is which cannot be guessed. A run stores the
architecture and weights, so it needs neither hub nor file later.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_model_config_from_hf

from coadvise.config import ImageSize, ModelConfig, TeacherConfig, plain_size
from coadvise.errors import UserError
from coadvise.models.network import HUB, Network, build_network, check_name, create_network, load_network, load_weights
from coadvise.models.published import load_with_notes, read_published, read_tensors
from coadvise.models.student import Student

_TIMM = f"{HUB}timm/"  # timm's own models there


def given_network(teacher: TeacherConfig, image_size: ImageSize) -> Network:
    """Loads a teacher that is not trained here, with the classes that it was trained on.

    Args:
        image_size: Pixels, for models that are built for one size; position embeddings are resampled to it.

    Raises:
        UserError: There is none, it could not be downloaded or read, or its classes have no names.
    """
    if teacher.checkpoint is not None:
        path = Path(teacher.checkpoint)
        return _from_file(teacher, path, image_size) if path.is_file() else load_network(path)
    if teacher.model.startswith(HUB):
        return _from_hub(teacher, image_size)
    return build_network(teacher, pretrained_classes(teacher.model), image_size, seed=0, pretrained=True)


def start_from(network: Network, path: str | Path, seed: int) -> list[str]:
    """Loads weights from a file that `coadvise.load_published` reads into an untrained student.

    Heads for other classes than the file's are newly initialised, as a function of `seed`, and so are tokens that the
    file does not have. Position embeddings are resampled to the image size.

    Returns:
        What is newly initialised, a sentence each.

    Raises:
        UserError: No such file, another layout or other sizes than the student's, or a student that is not a vision
            transformer.
    """
    model = network.model
    if not isinstance(model, Student):
        raise UserError(f"student.start: '{network.about['model']}' is not a vision transformer; remove student.start")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        published, notes = load_with_notes(
            path,
            token_names=list(model.token_names),
            num_heads=model.blocks[0].attn.num_heads,
            num_classes=len(network.classes),
            img_size=network.about["image_size"],
        )
    load_weights(network, published.state_dict(), Path(path))
    return [f"{path}: {note}" for note in notes]


def has_weights(model: str) -> bool:
    """Whether timm has published weights of a model."""
    settings = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return settings is not None and settings.has_weights


def pretrained_classes(model: str) -> list[str]:
    """The classes of timm's published weights: ImageNet's WordNet ids, which are also the names of its folders.

    Raises:
        UserError: No such model, no such weights, or weights for classes that timm does not name.
    """
    check_name(model)
    settings = timm.get_pretrained_cfg(model)
    if settings is None or not settings.has_weights:
        raise UserError(f"timm has no published weights for '{model}'; train the teacher here, or give its checkpoint")
    classes = _imagenet(settings.num_classes)
    if not classes:
        raise UserError(f"timm does not say what the {settings.num_classes} classes of '{model}' are; train it here")
    return classes


def _from_hub(config: ModelConfig, image_size: ImageSize) -> Network:
    """timm downloads `config.json`, which names architecture, arguments and classes, and the weights."""
    hub_name = config.model
    try:
        settings, model, arguments = load_model_config_from_hf(hub_name.removeprefix(HUB))
        arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
        colours = arguments.get("in_chans", settings.get("input_size", [3])[0])
    except Exception as error:  # hundreds of kinds: connection, the hub's client, a damaged file
        said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"'{hub_name}' could not be loaded: {said}; check its name and your connection, or give a "
            "teacher's checkpoint"
        ) from None
    if settings.get("custom_load") or colours != 3:  # timm could leave some weights random
        raise UserError(
            f"'{hub_name}' has weights in a format of its own (custom_load) or for {colours} image channels; give a "
            "model in timm's format for 3 channels"
        )
    about = {
        "model": str(model),
        "model_kwargs": {**arguments, **config.model_kwargs},
        "classes": _hub_classes(hub_name, settings),
        "image_size": plain_size(image_size),
    }
    return create_network(about, source=hub_name)


def _hub_classes(hub_name: str, settings: dict[str, Any]) -> list[str]:
    names, count = settings.get("label_names"), settings.get("num_classes")
    if isinstance(names, dict):  # by number
        names = [names.get(str(number)) for number in range(len(names))]
    if names is None and hub_name.startswith(_TIMM) and count:
        names = _imagenet(count)
    if not names or len(names) != count or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"'{hub_name}' does not say what its {count} classes are (label_names in its config.json), so they cannot "
            "be mapped to the data's; give a model that does, one of timm's, or none to train a teacher here"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"'{hub_name}' has several classes named '{twice[0]}'; give a model with unique names")
    return list(names)


def _from_file(config: ModelConfig, path: Path, image_size: ImageSize) -> Network:
    """Weights of the named model, or in a layout that `models/published.py` reads, for ImageNet's classes."""
    tensors, metadata = read_tensors(path)
    head = _head(config.model)
    if f"{head}.weight" in tensors and "model" not in metadata:
        model, count = config.model, next(iter(tensors[f"{head}.weight"].shape), 0)
        arguments: dict[str, Any] = dict(config.model_kwargs)
    else:
        found = read_published(path)
        model, arguments, tensors = found.model, dict(found.arguments), found.weights
        count, image_size = arguments.pop("num_classes"), arguments.pop("img_size", image_size)
    classes = _imagenet(count)
    if not classes:
        raise UserError(
            f"'{path}' has {count} classes without names, and only ImageNet's 1000 are known; give the folder of a "
            "teacher that a run trained, which names them"
        )
    about = {"model": model, "model_kwargs": arguments, "classes": classes, "image_size": plain_size(image_size)}
    network = create_network(about)
    load_weights(network, tensors, path)
    return network.eval()


def _head(model: str) -> str:
    """The name of a model's classifier layer."""
    check_name(model)
    settings = timm.get_pretrained_cfg(model)
    head = settings.classifier if settings else None
    return head if isinstance(head, str) else next(iter(head or ()), "")


def _imagenet(count: int) -> list[str]:
    """The WordNet ids of the ImageNet variant with so many classes; empty if there is none."""
    subset = infer_imagenet_subset({"num_classes": count})
    classes: list[str] = ImageNetInfo(subset).label_names() if subset else []
    return classes if len(classes) == count else []
