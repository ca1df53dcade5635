"""Teachers and students for images of 32 to 96 pixels, small enough to train on a CPU.

Their stems keep the full resolution, so a 32-pixel image still has 8x8 positions in the teachers' last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import nn

from coadvise.models.rednet import RedNet, create_rednet
from coadvise.models.staged import ConvBNReLU, StagedNet, build_stages, create_staged, default_cfg
from coadvise.models.student import PAPER_ALIGNMENT, Student, create_student, student_cfg


class SmallResNet(StagedNet):
    """A ResNet of basic blocks behind one 3x3 stride-1 convolution (He et al., CVPR 2016, 4.2; wider, shallower).

    Args:
        widths: Output channels of each stage; the stem has the first.
        depths: Blocks of each stage.
        strides: Stride of each stage.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head out.
        global_pool: timm's pooling name, or ``""`` for none.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block.
        zero_init_last: Start each block as its shortcut; with few blocks and short training that slows learning down.

    Raises:
        UserError: Stage lists of different lengths.
    """

    def __init__(
        self,
        widths: Sequence[int] = (48, 96, 192),
        depths: Sequence[int] = (1, 1, 1),
        strides: Sequence[int] = (1, 2, 2),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
    ) -> None:
        def block(
            in_width: int, width: int, stride: int, shortcut: nn.Module | None, drop_path: nn.Module | None
        ) -> nn.Module:
            return BasicBlock(in_width, width, stride, shortcut, drop_path=drop_path)

        super().__init__(
            stem=ConvBNReLU(in_chans, widths[0], 3),
            stem_width=widths[0],
            stem_stride=1,
            stem_pool=False,
            stages=build_stages(block, widths[0], widths, depths, strides, drop_path_rate),
            widths=widths,
            strides=strides,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.init_weights(zero_init_last)


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
    "zero_init_last": False,  # as for SmallResNet
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
def resnet_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """The convolution teacher for small images, about 0.7 M parameters."""
    return create_staged(SmallResNet, "resnet_small", pretrained, len(kwargs.get("depths", (1, 1, 1))), kwargs)


@register_model
def rednet_small(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """The involution teacher for small images, about 0.5 M parameters."""
    return create_rednet("rednet_small", pretrained, **{**REDNET_SMALL, **kwargs})


@register_model
def cit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> Student:
    """The student for small images, about 0.5 M parameters."""
    return create_student("cit_micro_patch4_32", pretrained, **{**CIT_MICRO, **kwargs})


@register_model
def cit_micro_aligned_patch4_32(pretrained: bool = False, **kwargs: Any) -> Student:
    """The student for small images with aligned tokens, about 0.6 M parameters."""
    return create_student(
        "cit_micro_aligned_patch4_32", pretrained, **{**CIT_MICRO, "aligned": PAPER_ALIGNMENT, **kwargs}
    )
