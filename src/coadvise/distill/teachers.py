"""Teachers: frozen networks that answer for the views a student is trained on."""

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
    """A network in evaluation mode, without gradients, from its construction on, whatever anyone calls.

    It is a copy made for answering (`Network.for_inference`); `network.about` says of which weights.

    Args:
        network: answers with its own normalisation.
        classes: the student's classes, in its order. The teacher's own are put into that order by name; those that the
            student does not have are left out.

    Raises:
        UserError: the teacher does not know all of these classes.
    """

    class_map: Tensor

    def __init__(self, name: str, network: Network, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network.for_inference()
        self.register_buffer("class_map", torch.tensor(check_classes(name, network, classes)))
        self.in_order = tuple(network.classes) == classes
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: a teacher whose batch norm follows the views is another teacher."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 to logits [B, K] in float32, in the student's order of classes."""
        # PyTorch before 2.13 cannot compile `inference_mode`; in a graph the two are the same.
        with torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode():
            logits = self.network(images)[CLASS].float()
            if not self.in_order:
                logits = logits[:, self.class_map]
        return logits.clone()  # an ordinary tensor again: the loss keeps it for the student's gradient


class Teachers:
    """Answers for a batch by all teachers, keyed by name. No teachers answer with an empty dict."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.by_name = dict(teachers)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        return {name: teacher(batch.images) for name, teacher in self.by_name.items()}


def check_classes(name: str, network: Network, classes: tuple[str, ...]) -> list[int]:
    """Where the student's classes stand among the teacher's. Raises UserError where it does not know all of them."""
    places = class_map(network.classes, classes)
    if places is None or len(set(classes)) < len(classes):
        raise UserError(
            f"teacher '{name}' answers for {len(network.classes)} classes ({_few(network.classes)}), the data has "
            f"{len(classes)} ({_few(classes)}); give a teacher that knows all of these, or none to have one trained "
            "here"
        )
    return places


def load_teachers(folders: Mapping[str, Path], classes: tuple[str, ...]) -> Teachers:
    """Reads finished teachers, by name. Raises UserError as `Teacher` and `load_network` do."""
    return Teachers({name: Teacher(name, load_network(folder), classes) for name, folder in folders.items()})


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
