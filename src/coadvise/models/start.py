"""Weights that a student starts from: timm's by name, a file, another run (`student.start`)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.config.reading import nearest
from coadvise.config.schema import WEIGHT_FILES
from coadvise.errors import UserError
from coadvise.models.network import Network, check_name, load_network, load_weights
from coadvise.models.pretrained import imagenet_classes
from coadvise.models.published import load_with_notes, read_tensors
from coadvise.models.student import Student
from coadvise.models.token_vit import WHICH, TokenViT
from coadvise.models.tokens import TokenModel
from coadvise.storage import MANIFEST

Heads = Mapping[str, tuple[Tensor, Tensor]]  # weight [K, D] and bias [K] by token


def start_from(network: Network, start: str | bool, seed: int) -> list[str]:
    """Loads weights into an untrained student.

    Heads for classes that the weights do not know are newly initialised, as a function of `seed`. Tokens that they do
    not have are newly initialised too; in timm's vision transformers they start as the class token. Position embeddings
    are resampled to the image size. Normalisation becomes that of the weights.

    Args:
        start: true for timm's weights of the student's model; a name in timm, of the same sizes or of a larger model of
            the same family, from whose layers evenly spaced rows are taken (Xu et al., ICLR 2024); a file that
            `coadvise.load_published` reads, or one of a timm model's weights; a run, or the folder of its student.

    Returns:
        What is newly initialised, a sentence each.

    Raises:
        UserError: No such weights, they could not be downloaded or read, or they are of another architecture.
    """
    given = Path(str(start))
    if start is not True and given.is_dir():
        return _start_from_run(network, given)
    if start is not True and (given.is_file() or given.suffix in WEIGHT_FILES):
        return _start_from_file(network, given, seed)
    name = str(network.about["model"] if start is True else start)
    if not timm.is_model(name):
        raise UserError(
            f"student.start={name} is no file, no run and no model of timm{nearest(name, timm.list_models())}; give "
            "one, or true for timm's weights of the student's own model"
        )
    return _start_from_timm(network, name)


def _start_from_timm(network: Network, name: str) -> list[str]:
    check_name(name)
    model, settings = network.model, timm.get_pretrained_cfg(name)
    if not isinstance(model, TokenViT):
        raise UserError(
            f"student.start={name}: timm's weights do not fit '{network.about['model']}'; give a file or a run, or "
            f"make student.model one of {WHICH}"
        )
    if settings is None or not settings.has_weights:
        raise UserError(
            f"student.start: timm has no published weights for '{name}'; give another name, a file or a run"
        )
    embed = model.vit.patch_embed
    sizes = {"img_size": embed.img_size} | ({"patch_size": embed.patch_size} if isinstance(embed, PatchEmbed) else {})
    try:
        weights = timm.create_model(name, pretrained=True, **sizes).state_dict()
    except Exception as error:  # of many kinds: connection, the hub's client, a model that has no such sizes
        said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"student.start: the weights of '{name}' could not be loaded: {said}; fetch them once where there is a "
            f"connection, coadvise fetch {name}, or give their file"
        ) from None
    notes = _fill(network, model.vit, weights, f"'{name}'", select=_family(name) == _family(network.about["model"]))
    network.normalise(settings.mean, settings.std)
    return _said(name, notes + _fill_tokens(network, {}, _class_head(weights), imagenet_classes(settings.num_classes)))


def _start_from_file(network: Network, path: Path, seed: int) -> list[str]:
    model, name = network.model, network.about["model"]
    if isinstance(model, TokenViT):
        tensors, _ = read_tensors(path)
        try:
            weights = checkpoint_filter_fn(dict(tensors), model.vit, adapt_layer_scale=True)
        except Exception:  # of timm's functions for a dozen layouts, given anything: then what differs is named
            weights = dict(tensors)
        notes, head = _fill(network, model.vit, weights, f"'{path}'"), _class_head(weights)
        classes = imagenet_classes(len(head[CLASS][0])) if head else []
        return _said(path, notes + _fill_tokens(network, {}, head, classes))
    if not isinstance(model, Student):
        raise UserError(
            f"student.start: '{name}' is not a vision transformer; give a run that trained it, or remove it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        published, notes = load_with_notes(
            path,
            token_names=list(model.token_names),
            num_heads=model.blocks[0].attn.num_heads,
            num_classes=len(network.classes),
            img_size=network.about["image_size"],
        )
    load_weights(network, published.state_dict(), path)
    return [f"{path}: {note}" for note in notes]


def _start_from_run(network: Network, folder: Path) -> list[str]:
    """From a run's first co-advised student, or from the network in a folder."""
    students = sorted(folder.glob(f"students/advised-*/{MANIFEST}"), key=lambda path: (len(path.parts[-2]), path))
    donor = load_network(students[0].parent if students else folder)
    model, given = network.model, donor.model
    ours, theirs = (one.about["model"].partition(".")[0] for one in (network, donor))
    assert isinstance(model, TokenModel)
    if not isinstance(given, TokenModel) or ours != theirs:
        raise UserError(
            f"student.start: '{folder}' has a '{theirs}', the student is a '{ours}'; give a run of the same"
        )
    tokens: dict[str, Tensor] = {}
    if isinstance(model, TokenViT) and isinstance(given, TokenViT):
        body, old = model.vit, given.vit
        if given.tokens is not None:
            tokens = dict(zip(given.token_names, given.tokens[0], strict=True))
    elif model.token_names == given.token_names:
        body, old = model, given
    else:
        ours, theirs = (", ".join(one.token_names) or "none" for one in (model, given))
        raise UserError(f"student.start: the student of '{folder}' has the tokens {theirs}, this one {ours}")
    if isinstance(body, VisionTransformer) and isinstance(old, VisionTransformer):
        old.set_input_size(img_size=body.patch_embed.img_size)
    notes = _fill(network, body, old.state_dict(), f"'{folder}'")
    heads = {name: (head.weight, head.bias) for name, head in _heads(donor).items()}
    network.normalise(donor.about["mean"], donor.about["std"])
    return _said(folder, notes + _fill_tokens(network, tokens, heads, donor.classes))


def _fill(
    network: Network, body: nn.Module, weights: Mapping[str, Tensor], where: str, select: bool = False
) -> list[str]:
    """Copies weights into a student's model, all but its heads.

    Args:
        body: the student, or what of it `weights` are of.
        select: take the first blocks of a deeper model, and evenly spaced rows of a wider one.

    Returns:
        What is newly initialised.

    Raises:
        UserError: weights that are missing, left over or of another shape.
    """
    heads = list(_heads(network).values())
    skipped = tuple(f"{name}." for name, module in body.named_modules() if any(module is head for head in heads))
    notes = []
    if getattr(network.model, "aligned", None) and not any(key.startswith("patch_embed.stems.") for key in weights):
        skipped += ("patch_embed.",)
        notes.append("newly initialised stems")
    wanted = {key: value for key, value in body.state_dict().items() if not key.startswith(skipped)}
    given = {key: value for key, value in weights.items() if not key.startswith(skipped)}
    if select:
        depth = len(body.get_submodule("blocks")._modules)
        kept = {key: value for key, value in given.items() if _block(key) < depth}
        narrow = {key: _selected(key, value, wanted[key].shape) for key, value in kept.items() if key in wanted}
        if any(narrow[key].shape != given[key].shape for key in narrow):
            notes.append(f"evenly spaced rows of its first {depth} layers are taken")
        elif len(kept) < len(given):
            notes.append(f"its first {depth} layers are taken")
        given = kept | narrow
    faults = [f"no {key}" for key in wanted if key not in given]
    faults += [f"unexpected {key}" for key in given if key not in wanted]
    faults += [
        f"{key} {list(given[key].shape)} instead of {list(value.shape)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"student.start: {where} has not the weights of '{network.about['model']}': {', '.join(faults[:3])}{more}"
        )
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(given[key])
    return notes


def _heads(network: Network) -> dict[str, nn.Linear]:
    assert isinstance(network.model, TokenModel)
    return {name: head for name, head in network.model.heads().items() if isinstance(head, nn.Linear)}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _said(start: object, notes: Sequence[str]) -> list[str]:
    return [f"student.start={start}: {'; '.join(notes)}"] if notes else []


def _family(model: str) -> str:
    """`vit` of vit_tiny_patch16_224.augreg_in21k."""
    return model.partition("_")[0]


def _class_head(weights: Mapping[str, Tensor]) -> Heads:
    """The head of a vision transformer in timm, if it has one of a usual form."""
    weight, bias = weights.get("head.weight"), weights.get("head.bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        return {}
    return {CLASS: (weight, bias)}


def _block(key: str) -> int:
    """The number of the block that a weight is of; -1 if it is of none."""
    found = re.match(r"blocks\.(\d+)\.", key)
    return int(found[1]) if found else -1


def _selected(key: str, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Evenly spaced rows, columns, ... of a larger tensor, by the same places for each width (Xu et al., ICLR 2024).

    Unchanged where a dimension is smaller or missing. Queries, keys and values share a tensor and are selected one by
    one, so that the same places of queries and keys meet.
    """
    if values.ndim != len(shape) or any(size < wanted for size, wanted in zip(values.shape, shape, strict=True)):
        return values
    if "attn.qkv." in key:
        one = [shape[0] // 3, *shape[1:]]
        return torch.cat([_selected("", part, one) for part in values.chunk(3)])
    for dimension, (size, wanted) in enumerate(zip(values.shape, shape, strict=True)):
        if size != wanted:
            places = torch.arange(wanted) * size // wanted
            values = values.index_select(dimension, places)
    return values


def _fill_tokens(network: Network, tokens: Mapping[str, Tensor], heads: Heads, classes: Sequence[str]) -> list[str]:
    """Gives tokens their vectors [D], and heads the rows of the classes that they know, by name.

    Args:
        heads: weights [K, D] and bias [K] by token.
        classes: the names of the K classes; empty if they have none.

    Returns:
        What is newly initialised.
    """
    model, notes = network.model, []
    assert isinstance(model, TokenModel)
    if isinstance(model, TokenViT) and model.tokens is not None:
        for row, name in enumerate(model.token_names):
            if name in tokens:
                model.tokens.data[:, row] = tokens[name]
        if new := [name for name in model.token_names if name not in tokens and name not in model.aligned]:
            model.start_tokens(new)
            notes.append(f"tokens that start as the class token: {', '.join(new)}")
    places = [(row, classes.index(name)) for row, name in enumerate(network.classes) if name in classes]
    fresh = []
    for name, head in _heads(network).items():
        weight, bias = heads.get(name, (torch.zeros(0), torch.zeros(0)))
        if places and weight.ndim == 2 and weight.shape[1] == head.weight.shape[1]:
            mine, theirs = ([pair[side] for pair in places] for side in (0, 1))
            head.weight.data[mine], head.bias.data[mine] = weight.data[theirs], bias.data[theirs]
        else:
            fresh.append(name)
    if fresh:
        notes.append(f"newly initialised heads: {', '.join(fresh)}")
    if len(fresh) < 1 + len(model.token_names) and len(places) < len(network.classes):
        new = [name for name in network.classes if name not in classes]
        notes.append(f"newly initialised in each head: {_few(new)}")
    return notes
