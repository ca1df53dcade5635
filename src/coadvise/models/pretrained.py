"""Networks trained elsewhere: timm's published weights, a model on a hub, a file of weights, another run's teacher.

One that is used as it is must name its classes, since which of a thousand outputs is which cannot be guessed; one that
is adapted gets a new head. A run stores the architecture and weights, so it needs neither hub nor file later.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_model_config_from_hf
from torch import nn

from coadvise.config.schema import (
    HUB,
    PYTHON,
    WEIGHT_FILES,
    ImageSize,
    ModelConfig,
    TeacherConfig,
    names_folder,
    names_model,
    plain_size,
)
from coadvise.errors import UserError
from coadvise.models.module import classes_of
from coadvise.models.network import Network, build_network, check_name, create_network, load_network, load_weights
from coadvise.models.published import read_published, read_tensors
from coadvise.storage import MANIFEST

_TIMM = f"{HUB}timm/"  # timm's own models there
_UNNAMED = "?"


def given_network(name: str, teacher: TeacherConfig, image_size: ImageSize) -> Network:
    """Loads a teacher that is not trained here, with the classes that it was trained on.

    Args:
        name: The teacher's, which one of a run's has too.
        image_size: Pixels, for models that are built for one size; position embeddings are resampled to it.

    Raises:
        UserError: There is none, it could not be downloaded or read, or its classes have no names.
    """
    return load_start(name, teacher, image_size, named=True).eval()


def adapted_network(
    name: str, teacher: TeacherConfig, classes: Sequence[str], image_size: ImageSize, seed: int
) -> tuple[Network, str]:
    """Loads the body of a teacher that is trained on here, and gives it a head for other classes.

    The head's rows of classes that both know, by name, are kept; the others are a function of `seed`.

    Returns:
        The network, and what is newly initialised, in a sentence.

    Raises:
        UserError: There is none, it could not be downloaded or read, or it is from a run and has just these classes.
    """
    network = load_start(name, teacher, image_size, named=False)
    model, known = network.model, [] if _UNNAMED in network.classes else network.classes
    if names_folder(str(teacher.start)) and tuple(known) == tuple(classes):
        raise UserError(
            f"teachers.{name}.adapt={teacher.adaptation}: '{teacher.start}' has the data's classes already; leave out "
            "adapt to use it as it is"
        )
    old = _head_of(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(len(classes))  # type: ignore[operator]
    adapted = Network(model, {**network.about, "classes": list(classes)})
    new = _head_of(adapted)
    both = [(row, known.index(label)) for row, label in enumerate(classes) if label in known]
    if new is None or old is None or not both or old.weight.shape[1:] != new.weight.shape[1:]:
        return adapted, "a new head"
    mine, theirs = ([pair[side] for pair in both] for side in (0, 1))
    for part, values in new.named_parameters():
        values.data[mine] = old.get_parameter(part).data[theirs]
    fresh = [label for label in classes if label not in known]
    return adapted, f"new in its head: {', '.join(fresh[:5])}{', ...' if len(fresh) > 5 else ''}" if fresh else ""


def fetch(name: str) -> None:
    """Downloads a model of timm, or of a hub, into the local cache. Raises UserError."""
    if not names_model(name):
        raise UserError(f"'{name}' is no name of a model; give one of timm, or {HUB}ORG/NAME")
    load_start("", TeacherConfig(model=name, start=name), 224, named=False)


def load_start(name: str, teacher: TeacherConfig, image_size: ImageSize, named: bool) -> Network:
    """Loads a network with its weights from where a teacher starts.

    Args:
        name, image_size: As for `given_network`.
        named: Its classes must have names; otherwise those without are called `_UNNAMED`.

    Raises:
        UserError: As `given_network`.
    """
    start = str(teacher.start)
    path = Path(start)
    if names_model(start):
        if path.is_dir() and not timm.is_model(start):
            raise UserError(f"'{start}' is read as the name of a model; give the folder as ./{start}")
        if start.startswith(PYTHON):
            check_name(start)
            return build_network(teacher, classes_of(start) if named else [_UNNAMED], image_size, seed=0)
        load = _from_hub if start.startswith(HUB) else _from_timm
        return load(teacher, image_size, named)
    if path.is_file() or start.endswith(WEIGHT_FILES):
        return _from_file(teacher, path, image_size, named)
    return load_network(_network_in(name, path))


def _class_names(names: Sequence[str], count: int, named: bool, problem: str) -> list[str]:
    """The names of a network's classes; `problem` says why there are none."""
    if names:
        return list(names)
    if named:
        raise UserError(f"{problem}; or let it learn the data's classes by adapt=finetune")
    return [_UNNAMED] * count


def _network_in(name: str, folder: Path) -> Path:
    """A network's folder: the given one, or that of a run's teacher, by its name or because it is the only one."""
    if (folder / MANIFEST).is_file():
        return folder
    teachers = {path.parent.name: path.parent for path in sorted(folder.glob(f"teachers/*/{MANIFEST}"))}
    found = teachers.get(name) or (next(iter(teachers.values())) if len(teachers) == 1 else None)
    if found is None and teachers:
        raise UserError(
            f"'{folder}' has no trained teacher '{name}'; give one of {', '.join(map(str, teachers.values()))}"
        )
    return found or folder


def _head_of(network: Network) -> nn.Linear | nn.Conv2d | None:
    """A network's classifier, if it is a layer with a row for each class."""
    try:
        head = network.model.get_classifier()  # type: ignore[operator]
    except Exception as error:  # a model of another making
        raise UserError(f"'{network.about['model']}' has no head that can be replaced ({error})") from None
    return head if isinstance(head, nn.Linear | nn.Conv2d) else None


def has_weights(model: str) -> bool:
    """Whether timm has published weights of a model."""
    settings = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return settings is not None and settings.has_weights


def _from_timm(teacher: TeacherConfig, image_size: ImageSize, named: bool) -> Network:
    """Published weights; their classes are ImageNet's WordNet ids, which are also the names of its folders."""
    model = teacher.model
    check_name(model)
    settings = timm.get_pretrained_cfg(model)
    if settings is None or not settings.has_weights:
        raise UserError(f"timm has no published weights for '{model}'; train the teacher here, or give a file of them")
    count = settings.num_classes
    problem = f"timm does not say what the {count} classes of '{model}' are"
    classes = _class_names(imagenet_classes(count), count, named, problem)
    return build_network(teacher, classes, image_size, seed=0, pretrained=True)


def _from_hub(config: ModelConfig, image_size: ImageSize, named: bool) -> Network:
    """timm downloads `config.json`, which names architecture, arguments and classes, and the weights."""
    hub_name = config.model
    try:
        settings, model, arguments = load_model_config_from_hf(hub_name.removeprefix(HUB))
        arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
        colours = arguments.get("in_chans", settings.get("input_size", [3])[0])
    except Exception as error:  # hundreds of kinds: connection, the hub's client, a damaged file
        said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"'{hub_name}' could not be loaded: {said}; check its name and your connection, or fetch it once where "
            f"there is one: coadvise fetch {hub_name}"
        ) from None
    if settings.get("custom_load") or colours != 3:  # timm could leave some weights random
        raise UserError(
            f"'{hub_name}' has weights in a format of its own (custom_load) or for {colours} image channels; give a "
            "model in timm's format for 3 channels"
        )
    names, problem = _hub_classes(hub_name, settings)
    classes = _class_names(names, int(settings.get("num_classes") or 0), named, problem)
    about = {
        "model": str(model),
        "model_kwargs": {**arguments, **config.model_kwargs},
        "classes": classes,
        "image_size": plain_size(image_size),
    }
    return create_network(about, source=hub_name)


def _hub_classes(hub_name: str, settings: dict[str, Any]) -> tuple[list[str], str]:
    """The names of the classes; if there are none, why."""
    names, count = settings.get("label_names"), settings.get("num_classes")
    if isinstance(names, dict):  # by number
        names = [names.get(str(number)) for number in range(len(names))]
    if names is None and hub_name.startswith(_TIMM) and count:
        names = imagenet_classes(count)
    if not names or len(names) != count or not all(isinstance(name, str) for name in names):
        return [], (
            f"'{hub_name}' does not say what its {count} classes are (label_names in its config.json), so they cannot "
            "be mapped to the data's; give a model that does, or one of timm's"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        return [], f"'{hub_name}' has several classes named '{twice[0]}'; give a model with unique names"
    return list(names), ""


def _from_file(config: ModelConfig, path: Path, image_size: ImageSize, named: bool) -> Network:
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
    problem = (
        f"'{path}' has {count} classes without names, and only ImageNet's 1000 are known; give the folder of a teacher "
        "that a run trained, which names them"
    )
    classes = _class_names(imagenet_classes(count), count, named, problem)
    about = {"model": model, "model_kwargs": arguments, "classes": classes, "image_size": plain_size(image_size)}
    network = create_network(about)
    load_weights(network, tensors, path)
    return network


def _head(model: str) -> str:
    """The name of a model's classifier layer."""
    check_name(model)
    settings = timm.get_pretrained_cfg(model)
    head = settings.classifier if settings else None
    return head if isinstance(head, str) else next(iter(head or ()), "")


def imagenet_classes(count: int) -> list[str]:
    """The WordNet ids of the ImageNet variant with so many classes; empty if there is none."""
    subset = infer_imagenet_subset({"num_classes": count})
    classes: list[str] = ImageNetInfo(subset).label_names() if subset else []
    return classes if len(classes) == count else []
