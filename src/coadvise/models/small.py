"""Teachers and students for images of 32 to 96 pixels, small enough to train on a CPU.

Their stems keep the full resolution, so a 32-pixel image still has 8x8 positions in the teachers' last stage.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from coadvise.models.rednet import RedNet, create_rednet
from coadvise.models.resnet import BasicResNet
from coadvise.models.staged import create_staged, default_cfg
from coadvise.models.student import PAPER_ALIGNMENT, Student, create_student, student_cfg

default_cfgs = generate_default_cfgs(
    {
        "resnet_small.untrained": default_cfg(32, "stem.conv", pool_size=(8, 8)),
        "rednet_small.untrained": default_cfg(32, "stem.0.conv", pool_size=(8, 8)),
        "cit_micro_patch4_32.untrained": student_cfg(32),
        "cit_micro_aligned_patch4_32.untrained": student_cfg(32),
    }
)

REDNET_SMALL: dict[str, Any] = {
    "depths": (1, 2, 2),
    "widths": (64, 256, 512),  # the first stage, at full resolution, costs the most
    "strides": (1, 2, 2),
    "stem_width": 32,
    "stem_stride": 1,
    "stem_pool": False,
    "kernel_size": 7,
    "zero_init_last": False,  # as for BasicResNet
}

# The proportions of ViT-Lite (Hassani et al., 2021), which also learns from small images without pretraining.
CIT_MICRO: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 2.0,
}


@register_model
def resnet_small(pretrained: bool = False, **kwargs: Any) -> BasicResNet:
    """The convolution teacher for small images, about 0.7 M parameters with 10 classes."""
    return create_staged(BasicResNet, "resnet_small", pretrained, len(kwargs.get("depths", (1, 1, 1))), kwargs)


@register_model
def rednet_small(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """The involution teacher for small images, about 0.5 M parameters with 10 classes."""
    return create_rednet("rednet_small", pretrained, **{**REDNET_SMALL, **kwargs})


@register_model
def cit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> Student:
    """The student for small images, about 0.5 M parameters with 10 classes."""
    return create_student("cit_micro_patch4_32", pretrained, **{**CIT_MICRO, **kwargs})


@register_model
def cit_micro_aligned_patch4_32(pretrained: bool = False, **kwargs: Any) -> Student:
    """The student for small images with aligned tokens, about 0.6 M parameters with 10 classes."""
    return create_student(
        "cit_micro_aligned_patch4_32", pretrained, **{**CIT_MICRO, "aligned": PAPER_ALIGNMENT, **kwargs}
    )
