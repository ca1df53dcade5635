"""Published checkpoints, as models of this package.

Four layouts are recognised by their keys; depth and widths follow from the tensors' shapes:

- RedNet (d-li14/involution), with or without ``backbone.`` and ``head.fc.``, or with ``model.`` and ``classifier.`` as
  the Co-advise authors wrapped it;
- the Co-advise student with token alignment (OliverRensu/co-advise);
- DeiT and distilled DeiT (facebookresearch/deit), as the start of a student;
- the output of ``coadvise convert``.

Keys may have the prefixes of PyTorch's parallel and compiled modules. Nothing in a file is executed. A missing or
unexpected key is an error that names it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import safe_open
from timm.models import load_pretrained
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from coadvise.errors import UserError
from coadvise.models.rednet import BLOCKS, EXPANSION, GROUP_CHANNELS
from coadvise.models.student import PAPER_ALIGNMENT, Student
from coadvise.models.tokens import PAPER_TOKENS, check_token_names
from coadvise.storage import write_weights

Tensors = Mapping[str, Tensor]

HEAD_WIDTH = 64  # of an attention head in every DeiT and CiT; shapes do not show it
_ADAPTED = ("num_classes", "img_size", "in_chans")  # which timm adapts weights to when it loads them
_CONTAINERS = ("state_dict", "model")  # keys under which mmcls, DeiT and the Co-advise authors store the weights
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of PyTorch's parallel and compiled modules


@dataclass(frozen=True)
class Published:
    """A published checkpoint, as a model of this package.

    Attributes:
        layout: What the file was recognised as.
        model: The timm name.
        arguments: The arguments for ``timm.create_model``.
        weights: The model's whole state dict.
        notes: What the file did not contain and is newly initialised, a sentence each.
    """

    layout: str
    model: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_published(path: str | Path, distillation_token: str | None = None, **arguments: Any) -> Published:
    """Read a checkpoint, recognise its layout and rename its weights to this package's names.

    Args:
        path: A ``.safetensors`` file, or one that ``torch.save`` wrote.
        distillation_token: For a distilled DeiT, the token to load its distillation token into; None for the first.
        arguments: What shapes do not show (``num_heads``), or a DeiT does not have (``token_names``).

    Raises:
        UserError: No such file, more in it than tensors and plain values, an unknown layout, or keys that are missing,
            left over or of another shape.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    for key, value in tensors.items():
        if value.layout != torch.strided or not (value.is_floating_point() or key.endswith("num_batches_tracked")):
            kind = str(value.dtype if value.layout == torch.strided else value.layout).removeprefix("torch.")
            raise UserError(f"'{path}': {key} is {kind}; weights must be dense floating-point tensors")
    if distillation_token is not None and "dist_token" not in tensors:
        raise UserError(f"'{path}' has no distillation token for '{distillation_token}'; leave out distillation_token")
    names = {key: key for key in tensors}  # the name here -> the file's
    if "model" in metadata and "arguments" in metadata:
        known = _stated_arguments(path, metadata["arguments"], len(tensors))
        weights = _in_order(tensors, known, arguments)
        found = Published("coadvise convert", metadata["model"], {**known, **arguments}, weights)
    elif "reg_token" not in tensors and {"cls_token", "patch_embed.proj.weight"} <= tensors.keys():
        found = _deit(path, tensors, distillation_token, arguments)
    elif "conv_embed.proj.weight" in tensors or "inv_embed.proj.weight" in tensors:
        names = _renamed(path, tensors, ((r"^(conv|inv)_embed\.", r"patch_embed.stems.\1."),))
        found = _aligned_student(path, {new: tensors[old] for new, old in names.items()}, arguments)
    elif any(re.fullmatch(r"(backbone\.|model\.)?stem\.1\.conv1\.conv\.weight", key) for key in tensors):
        names = _renamed(path, tensors, ((r"^(backbone|model)\.", ""), (r"^(head\.fc|classifier)\.", "fc.")))
        found = _rednet(path, {new: tensors[old] for new, old in names.items()}, arguments)
    else:
        raise _unknown(path, tensors)
    _check_whole(path, found, names)
    return found


def _stated_arguments(path: Path, text: str, tensors: int) -> dict[str, Any]:
    """The arguments in a file's metadata, checked: no network with more blocks than the file has tensors is built."""
    try:
        known = json.loads(text)
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(f"'{path}' is damaged: its arguments are not a JSON object; convert the checkpoint again")
    for name in ("depth", "depths", "num_blocks"):
        counts = known.get(name, 0)
        counts = counts if isinstance(counts, list) else [counts]
        if not all(isinstance(count, int) for count in counts) or sum(counts) > tensors:
            raise UserError(
                f"'{path}' says {name}={known[name]!r}, and has {tensors} tensors; convert the checkpoint again"
            )
    return known


def convert(path: str | Path, out: str | Path, distillation_token: str | None = None, **arguments: Any) -> Published:
    """Write a published checkpoint as safetensors that ``timm.create_model(model, checkpoint_path=out)`` loads.

    The file's metadata has ``model`` and ``arguments`` (JSON).

    Args:
        path, distillation_token, arguments: As for ``read_published``.
        out: The file to write, ending in ``.safetensors``.

    Raises:
        UserError: As ``read_published``, or another ending; nothing is written then.
    """
    if Path(out).suffix != ".safetensors":
        raise UserError(f"'{out}' must end in .safetensors, the format of the output")
    found = read_published(path, distillation_token, **arguments)
    metadata = {"format": "pt", "model": found.model, "arguments": json.dumps(found.arguments)}
    write_weights(Path(out), found.weights, metadata)
    return found


def load_published(path: str | Path, distillation_token: str | None = None, **model_kwargs: Any) -> nn.Module:
    """Make the model of a published checkpoint, in evaluation mode, with its weights.

    A warning says what is newly initialised.

    Args:
        path, distillation_token: As for ``read_published``.
        model_kwargs: What shapes do not show (``num_heads``); what should differ from the checkpoint (``num_classes``:
            all heads are newly initialised then; ``img_size``: the position embedding is resampled; ``in_chans``); and
            any other argument of the model (``drop_path_rate``).

    Raises:
        UserError: As ``read_published``.
    """
    model, notes = load_with_notes(path, distillation_token, **model_kwargs)
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return model


def load_with_notes(
    path: str | Path, distillation_token: str | None = None, **model_kwargs: Any
) -> tuple[nn.Module, list[str]]:
    """As ``load_published``, but return what is newly initialised, a sentence each, instead of warnings."""
    adapted = {key: model_kwargs.pop(key) for key in _ADAPTED if key in model_kwargs}
    found = read_published(path, distillation_token, **model_kwargs)
    model = _create(path, found.model, {**found.arguments, **adapted})
    classes, channels = found.arguments["num_classes"], found.arguments["in_chans"]
    own = cast(dict[str, Any], model.pretrained_cfg)
    size = (channels, *own["input_size"][1:])
    source = {"state_dict": dict(found.weights), "num_classes": classes, "input_size": size}
    resample = checkpoint_filter_fn if isinstance(model, Student) else None
    load_pretrained(model, {**own, **source}, adapted.get("num_classes", classes), model.in_chans, filter_fn=resample)
    notes = list(found.notes)
    if adapted.get("num_classes", classes) not in (0, classes):
        notes.append(f"heads for {adapted['num_classes']} classes instead of {classes} are newly initialised")
    return model.eval(), notes


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by key, and the metadata of safetensors. Raises UserError; nothing in it is executed."""
    if not path.is_file():
        raise UserError(f"no checkpoint '{path}'; give a .pt, .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        # The Co-advise authors saved their configuration with the weights, DeiT's training script its arguments. Both
        # become plain containers here, and none of their code is imported.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file can make PyTorch raise almost anything
        reason = re.search(r"GLOBAL ([A-Za-z_]\w+(?:\.\w+)*) ", str(error))
        fault = f"it holds a {reason[1]}, not only tensors and plain values" if reason else "it is damaged"
        raise UserError(f"'{path}' could not be loaded: {fault}; give a complete file with weights only") from None
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        raise UserError(
            f"'{path}' holds no weights: neither a dict of tensors by name nor one under {' or '.join(_CONTAINERS)}"
        )
    while wrapper := next((w for w in _WRAPPERS if all(key.startswith(w) for key in content)), None):
        content = {key.removeprefix(wrapper): value for key, value in content.items()}
    return dict(content), {}


def _unknown(path: Path, tensors: Tensors) -> UserError:
    few = ", ".join(list(tensors)[:3])
    return UserError(
        f"'{path}' has an unknown layout ({len(tensors)} tensors: {few}, ...); known are RedNet, the Co-advise "
        "student, DeiT, and the output of 'coadvise convert'; for a run's student use coadvise.load"
    )


def _renamed(path: Path, tensors: Tensors, rules: Sequence[tuple[str, str]]) -> dict[str, str]:
    """{the key's name here: the file's}, by regular expressions."""
    names: dict[str, str] = {}
    for old in tensors:
        new = old
        for pattern, name in rules:
            new = re.sub(pattern, name, new)
        if new in names:
            raise UserError(f"'{path}' has the same weights twice, as {names[new]} and {old}; drop one")
        names[new] = old
    return names


class _Shapes:
    """Sizes of tensors by key; a missing one raises UserError."""

    def __init__(self, path: Path, tensors: Tensors) -> None:
        self.path, self.tensors = path, tensors

    def size(self, key: str, dimension: int) -> int:
        if key not in self.tensors or self.tensors[key].ndim <= dimension or not self.tensors[key].numel():
            raise UserError(
                f"'{self.path}': the key {key} is missing or has too few dimensions; give a complete checkpoint"
            )
        return self.tensors[key].shape[dimension]

    def count(self, pattern: str) -> int:
        """How many numbers the pattern's group has, which must run from 0 without a gap."""
        named = {int(match[1]): key for key in self.tensors if (match := re.match(pattern, key))}
        for number, (given, key) in enumerate(sorted(named.items())):
            if given != number:
                raise UserError(
                    f"'{self.path}' has the key {key}, and none of number {number}; give a complete checkpoint"
                )
        return len(named)

    def classes(self, head: str) -> int:
        return self.size(f"{head}.weight", 0) if f"{head}.weight" in self.tensors else 0


def _rednet(path: Path, tensors: Tensors, given: Mapping[str, Any]) -> Published:
    if "token_names" in given:
        raise UserError(f"'{path}' is a RedNet, which has no tokens; a student starts from a DeiT or a student")
    shapes = _Shapes(path, tensors)
    depths = tuple(shapes.count(rf"layer{stage}\.(\d+)\.") for stage in range(1, 5))
    name = next((f"rednet{depth}" for depth, blocks in BLOCKS.items() if blocks == depths), None)
    if name is None:
        known = ", ".join(f"{depth}: {blocks}" for depth, blocks in BLOCKS.items())
        raise UserError(f"'{path}' has {depths} blocks per stage; published RedNets have {known}")
    inner = shapes.size("layer1.0.conv1.weight", 0)  # channels that the first involution works on
    window = shapes.size("layer1.0.conv2.conv2.conv.weight", 0) / (inner / GROUP_CHANNELS)
    arguments = {
        "widths": [EXPANSION * shapes.size(f"layer{stage}.0.conv1.weight", 0) for stage in range(1, 5)],
        "stem_width": shapes.size("stem.4.conv.weight", 0),
        "kernel_size": round(math.sqrt(window)),
        "in_chans": shapes.size("stem.0.conv.weight", 1),
        "num_classes": shapes.classes("fc"),
    }
    return Published("RedNet", name, {**arguments, **given}, dict(tensors))


def _transformer(shapes: _Shapes, patch_size: int, tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of every vision transformer; ``tokens`` precede the patches in its position embedding."""
    width = shapes.size("cls_token", 2)
    if width % HEAD_WIDTH and "num_heads" not in given:
        raise UserError(
            f"'{shapes.path}' is {width} wide, not a multiple of {HEAD_WIDTH}, so the number of attention heads is "
            "unknown; give num_heads=N"
        )
    patches = shapes.size("pos_embed", 1) - tokens
    side = math.isqrt(max(patches, 0))
    if side * side != patches:
        raise UserError(
            f"'{shapes.path}' has positions for {patches} patches, no square number; only square images are supported"
        )
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": shapes.count(r"blocks\.(\d+)\."),
        "num_heads": max(width // HEAD_WIDTH, 1),
        "mlp_ratio": shapes.size("blocks.0.mlp.fc1.weight", 0) / width,
        "num_classes": shapes.classes("head"),
    }


def _aligned_student(path: Path, tensors: Tensors, given: Mapping[str, Any]) -> Published:
    shapes = _Shapes(path, tensors)
    stem = "patch_embed.stems.conv"
    patch_size = 2 * shapes.size(f"{stem}.proj.weight", 3)  # the stem halves the image, its projection does the rest
    arguments = _transformer(shapes, patch_size, 1 + len(PAPER_TOKENS), given)
    arguments |= {"in_chans": shapes.size(f"{stem}.conv.0.weight", 1)}
    arguments |= {"token_names": list(PAPER_TOKENS), "aligned": PAPER_ALIGNMENT}
    weights = _in_order(tensors, arguments, given)
    return Published("Co-advise student", "cit_small_aligned_patch16_224", {**arguments, **given}, weights)


def _in_order(tensors: Tensors, known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """A student's weights with its tokens in the requested order; heads and stems go by name.

    If the requested tokens are others than the file's, nothing is changed, and `_check_whole` reports what differs.
    """
    there, wanted = list(known.get("token_names", ())), list(given.get("token_names", ()))
    weights = dict(tensors)
    if there == wanted or sorted(there) != sorted(wanted) or "pos_embed" not in weights:
        return weights
    learned = [name for name in there if name not in (known.get("aligned") or {})]
    if "reg_token" in weights:
        weights["reg_token"] = weights["reg_token"][:, [learned.index(name) for name in wanted if name in learned]]
    of_class, of_tokens, rest = weights["pos_embed"].tensor_split([1, 1 + len(there)], dim=1)
    order = [there.index(name) for name in wanted]
    weights["pos_embed"] = torch.cat([of_class, of_tokens[:, order], rest], dim=1)
    return weights


def _deit(path: Path, tensors: Tensors, token: str | None, given: Mapping[str, Any]) -> Published:
    """A student with DeiT's class token, blocks and patches, and at most one token, the distillation token."""
    if given.get("aligned"):
        raise UserError("aligned tokens need stems, which a DeiT checkpoint does not have; leave out 'aligned'")
    shapes = _Shapes(path, tensors)
    distilled = "dist_token" in tensors
    names = check_token_names(given.get("token_names", PAPER_TOKENS))
    if distilled and token is None and names:
        token = names[0]
    if distilled and token not in names:
        raise UserError(f"distillation_token must be one of the student's tokens, {list(names)}, not '{token}'")
    arguments = _transformer(shapes, shapes.size("patch_embed.proj.weight", 3), 1 + distilled, given)
    arguments |= {"in_chans": shapes.size("patch_embed.proj.weight", 1), **given, "token_names": list(names)}
    model = "cit_small_patch16_224" if arguments["embed_dim"] == 384 else "cit_tiny_patch16_224"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same file each time
        fresh = _create(path, model, arguments).state_dict()
    try:
        weights = _graft(tensors, fresh, names, token)
    except RuntimeError as error:  # widths or positions that differ
        raise UserError(f"'{path}' does not fit {model} with {arguments}: {error}") from None
    notes = tuple(
        f"token '{name}' is newly initialised: its vector, its position and its head" for name in names if name != token
    )
    return Published("distilled DeiT" if distilled else "DeiT", model, arguments, weights, notes)


def _graft(tensors: Tensors, fresh: Tensors, names: Sequence[str], token: str | None) -> dict[str, Tensor]:
    """DeiT's weights under the student's names, and a new student's for the tokens that DeiT does not have."""
    weights = {key: value for key, value in tensors.items() if key not in ("pos_embed", "dist_token")}
    old, positions = tensors["pos_embed"], fresh["pos_embed"].clone()
    positions[:, 0] = old[:, 0]
    positions[:, 1 + len(names) :] = old[:, 1 if token is None else 2 :]
    if names:
        weights["reg_token"] = fresh["reg_token"].clone()
    if token is not None:
        place = names.index(token)
        positions[:, 1 + place], weights["reg_token"][:, place] = old[:, 1], tensors["dist_token"][:, 0]
        for key in [key for key in weights if key.startswith("head_dist.")]:
            weights[key.replace("head_dist.", f"head_{token}.")] = weights.pop(key)
    missing = tuple(f"head_{name}." for name in names if name != token)
    heads = {key: value for key, value in fresh.items() if key.startswith(missing)}
    return {**weights, **heads, "pos_embed": positions}


def _create(path: str | Path, model: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(model, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"'{path}' cannot be loaded as {model} with {dict(arguments)}: {error}") from None


def _check_whole(path: Path, found: Published, names: Mapping[str, str]) -> None:
    """Raises UserError that names every unexpected or missing key, and every key of another shape."""
    with torch.device("meta"):
        wanted = _create(path, found.model, found.arguments).state_dict()
    given = found.weights
    faults = {
        "unexpected keys": [names.get(key, key) for key in given if key not in wanted],
        "missing keys": [key for key in wanted if key not in given],
        "keys of another shape": [
            f"{names.get(key, key)} {list(given[key].shape)} instead of {list(value.shape)}"
            for key, value in wanted.items()
            if key in given and given[key].shape != value.shape
        ],
    }
    said = [f"{fault}: {', '.join(keys)}" for fault, keys in faults.items() if keys]
    if said:
        raise UserError(
            f"'{path}' is a {found.layout} checkpoint that does not fit {found.model}; {'; '.join(said)}; give the "
            "complete checkpoint, or the arguments that it was trained with"
        )
