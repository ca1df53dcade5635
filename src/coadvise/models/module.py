"""A teacher that is a plain module of Python. It is registered with timm, so all else treats it as any other model.

A run keeps its weights, not its code: a process that loads it must have been given the module, too.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

from coadvise.config.schema import PYTHON, ImageSize, sides
from coadvise.errors import UserError
from coadvise.models.staged import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Given:
    """A module as it was given.

    Attributes:
        outputs: how many numbers it answers for an image: logits, or features.
        classes: whose logits it answers, if it is used as it is.
    """

    module: nn.Module
    outputs: int
    classes: tuple[str, ...]


_given: dict[str, Given] = {}  # by registered name; only this process knows their code


class ModuleTeacher(nn.Module):
    """A module behind timm's contract: its own logits, or a linear head on its features.

    Args:
        body: Maps normalised images [B, 3, H, W] to logits or features [B, outputs]; maps [B, outputs, H', W'] are
            averaged.
        outputs: See above.
        num_classes: Of the head.
        new_head: Whether there is one.
    """

    def __init__(self, body: nn.Module, outputs: int, num_classes: int, new_head: bool) -> None:
        super().__init__()
        self.body, self.num_features = body, outputs
        self.head: nn.Module = nn.Linear(outputs, num_classes) if new_head else nn.Identity()
        settings = getattr(body, "pretrained_cfg", None) or {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        self.pretrained_cfg = {key: settings[key] for key in ("mean", "std")}

    def forward_features(self, x: Tensor) -> Tensor:
        """Map normalised images [B, 3, H, W] to what the body answers, [B, outputs]."""
        return _flat(self.body(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map what the body answers to logits [B, num_classes]."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the head; without one, what changes nothing."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one."""
        self.head = nn.Linear(self.num_features, num_classes)


def overrides_for(modules: Mapping[str, nn.Module], given: Sequence[str]) -> list[str]:
    """The keys of a configuration that name these teachers.

    Args:
        modules: By the teacher's name.
        given: The user's overrides. Without an `adapt` among them a module is used as it is.
    """
    found = []
    for name, module in modules.items():
        adapts = [text.partition("=")[2] for text in given if text.startswith(f"teachers.{name}.adapt=")]
        new_head = bool(adapts) and adapts[-1] not in ("none", "null")
        found += [f"teachers.{name}.start={_name_of(module)}", f"teachers.{name}.model_kwargs={{new_head: {new_head}}}"]
        found += [] if new_head else [f"teachers.{name}.adapt=none"]
    return found


def register(name: str, module: nn.Module, image_size: ImageSize, classes: Sequence[str], adapted: bool) -> None:
    """Makes a module a model of timm's registry.

    Args:
        name: The teacher's.
        classes: The data's, whose logits it answers unless it is `adapted`.

    Raises:
        UserError: It fails on images of this size, or answers something else.
    """
    height, width = sides(image_size)
    body = copy.deepcopy(module).eval()
    try:
        with torch.no_grad():
            answer = _flat(body(torch.zeros(2, 3, height, width)))
    except Exception as error:  # any code may be in it
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"teachers: '{name}' ({type(module).__name__}) fails on images [2, 3, {height}, {width}]: {said}"
        ) from None
    if not adapted and answer.shape[1] != len(classes):
        raise UserError(
            f"teachers: '{name}' ({type(module).__name__}) answers {answer.shape[1]} numbers an image, the data have "
            f"{len(classes)} classes; give one that answers logits of {', '.join(classes[:5])} in this order, or let "
            f"it learn them: teachers.{name}.adapt=probe or finetune"
        )
    own = _name_of(module)
    if not timm.is_model(own):

        def entrypoint(pretrained: bool = False, num_classes: int = 1, new_head: bool = False, **_: Any) -> nn.Module:
            known = _given[own]
            return ModuleTeacher(copy.deepcopy(known.module), known.outputs, num_classes, new_head)

        entrypoint.__name__ = own
        register_model(entrypoint)
    _given[own] = Given(body, answer.shape[1], tuple(classes))


def classes_of(name: str) -> tuple[str, ...]:
    """The classes of a registered module that is used as it is."""
    return _given[name].classes


def _flat(answer: object) -> Tensor:
    """A module's answer as [B, outputs]."""
    if not isinstance(answer, Tensor) or answer.ndim not in (2, 4):
        shape = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UserError(f"it answers {shape}; give a module that answers logits or features [B, N]")
    return answer.mean(dim=(2, 3)) if answer.ndim == 4 else answer


def _name_of(module: nn.Module) -> str:
    """A name of the class and the weights: with other weights it is another teacher."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{PYTHON}{type(module).__name__}_{digest.hexdigest()[:12]}"
