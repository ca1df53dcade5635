"""Students and teachers, registered with timm by this import: ``timm.create_model(name)`` builds any of ``MODELS``."""

from coadvise import torchvision_guard  # noqa: F401  # isort: skip  (before anything that imports torchvision)

from typing import Any

import timm
import torch

from coadvise.models import small  # noqa: F401  (registers)
from coadvise.models.pooled import CoadvisedMixer, CoadvisedResNet
from coadvise.models.rednet import RedNet
from coadvise.models.resnet import BasicResNet
from coadvise.models.stems import AlignedPatchEmbed, ConvStem, InvolutionStem
from coadvise.models.student import Student
from coadvise.models.tokens import TokenModel

RESNETS = ("resnet_small",)
REDNETS = ("rednet26", "rednet38", "rednet50", "rednet101", "rednet152", "rednet_small")
TRANSFORMERS = (
    "cit_tiny_patch16_224",
    "cit_small_patch16_224",
    "cit_small_aligned_patch16_224",
    "cit_micro_patch4_32",
    "cit_micro_aligned_patch4_32",
)
OTHER_BIAS = ("resnet10_coadvised", "mixer_tiny_coadvised")
STUDENTS = (*TRANSFORMERS, *OTHER_BIAS)
MODELS = (*RESNETS, *REDNETS, *STUDENTS)

__all__ = [
    "MODELS",
    "OTHER_BIAS",
    "REDNETS",
    "RESNETS",
    "STUDENTS",
    "TRANSFORMERS",
    "AlignedPatchEmbed",
    "BasicResNet",
    "CoadvisedMixer",
    "CoadvisedResNet",
    "ConvStem",
    "InvolutionStem",
    "RedNet",
    "Student",
    "TokenModel",
    "describe_models",
]


def describe_models() -> list[dict[str, Any]]:
    """One row a registered network: model, role, parameters with its default classes (1000), image size in pixels."""
    rows: list[dict[str, Any]] = []
    for role, names in (("teacher", (*RESNETS, *REDNETS)), ("student", STUDENTS)):
        for name in names:
            with torch.device("meta"):
                model = timm.create_model(name)
            size = model.pretrained_cfg["input_size"][-1]
            count = sum(p.numel() for p in model.parameters())
            rows.append({"model": name, "role": role, "parameters": count, "image_size": size})
    return rows
