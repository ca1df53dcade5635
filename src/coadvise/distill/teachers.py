"""Teachers: frozen networks that give logits for the views a student is trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.data.views import Batch
from coadvise.errors import UserError
from coadvise.models.network import Network, class_map, load_network


class Teacher(nn.Module):
    """A network that is always in evaluation mode and without gradients.

    It is a copy made for inference (`Network.for_inference`).

    Args:
        network: normalises images itself.
        classes: the student's classes, in its order. The teacher's are mapped to them by name; others are left out.

    Raises:
        UserError: the teacher lacks some of these classes.
    """

    class_map: Tensor

    def __init__(self, name: str, network: Network, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network.for_inference()
        self.register_buffer("class_map", torch.tensor(check_classes(name, network, classes)))
        self.in_order = tuple(network.classes) == classes
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: otherwise the views would change batch norm's statistics."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] in float32, in the student's order of classes, of images [B, 3, H, W] in 0..1."""
        # PyTorch before 2.13 cannot compile `inference_mode`; in a graph `no_grad` is the same.
        with torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode():
            logits = self.network(images)[CLASS].float()
            if not self.in_order:
                logits = logits[:, self.class_map]
        return logits.clone()  # no longer an inference tensor: autograd keeps it for the student's gradient


class Teachers:
    """Logits [B, K] of all teachers for a batch, by name; an empty dict without teachers."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.by_name = dict(teachers)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        return {name: teacher(batch.images) for name, teacher in self.by_name.items()}


def check_classes(name: str, network: Network, classes: tuple[str, ...]) -> list[int]:
    """The indices of the student's classes among the teacher's. Raises UserError if the teacher lacks some."""
    places = class_map(network.classes, classes)
    if places is None or len(set(classes)) < len(classes):
        raise UserError(
            f"teacher '{name}' has {len(network.classes)} classes ({_few(network.classes)}), the data "
            f"has {len(classes)} ({_few(classes)}); give a teacher with all of these, or none to train one here"
        )
    return places


def load_teachers(folders: Mapping[str, Path], classes: tuple[str, ...]) -> Teachers:
    """Loads finished teachers, by name. Raises UserError as `Teacher` and `load_network` do."""
    return Teachers({name: Teacher(name, load_network(folder), classes) for name, folder in folders.items()})


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
