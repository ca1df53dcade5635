"""RedNet, the involution network: the teacher whose kernels differ by place and are shared by channels.

ResNet with every 3x3 convolution of its bottlenecks, and the middle one of its stem, replaced by an involution
(Li et al., *Involution: Inverting the Inherence of Convolution for Visual Recognition*, CVPR 2021). Parameter names are
those of the published checkpoints (d-li14/involution, without its ``backbone.`` and ``head.`` prefixes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from coadvise.errors import UserError
from coadvise.models.staged import ConvBNReLU, StagedNet, add_shortcut, build_stages, create_staged, default_cfg
from coadvise.ops import FusedSequential, Involution2d, batch_norm_relu

GROUP_CHANNELS = 16  # channels that share one involution kernel
EXPANSION = 4  # a block's output width over its bottleneck's

BLOCKS = {
    26: (1, 2, 4, 1),
    38: (2, 3, 5, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def overlapping_kernel(stride: int) -> int:
    """The side of a first convolution whose windows overlap: 3 as published for strides of 1 and 2, 7 for 4."""
    return max(3, 2 * stride - 1)


def involution_stem(in_chans: int, width: int, stride: int = 2, last_stride: int = 1) -> FusedSequential:
    """RedNet's stem: 3x3 convolution to half the width, 3x3 involution, 3x3 convolution, each with batch norm and ReLU.

    Args:
        in_chans: Image channels.
        width: Output channels; a multiple of 32, since the involution has 16 channels a group on half of them.
        stride: Stride of the first convolution; 2 as published, 1 for small images. From 3 on its kernel is larger.
        last_stride: Stride of the last convolution; 1 as published.

    Raises:
        UserError: A width that does not divide into groups.
    """
    if width < 1 or width % (2 * GROUP_CHANNELS):
        raise UserError(f"stem width {width} must be a multiple of {2 * GROUP_CHANNELS}")
    half = width // 2
    return FusedSequential(
        ConvBNReLU(in_chans, half, overlapping_kernel(stride), stride),
        Involution2d(half, 3, group_channels=GROUP_CHANNELS),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        ConvBNReLU(half, width, 3, last_stride),
    )


class InvolutionBottleneck(nn.Module):
    """1x1 convolution, KxK involution (it has the stride), 1x1 convolution, and a shortcut around them.

    Args:
        in_width: Channels of the input [B, in_width, H, W].
        width: Channels of the output [B, width, H / stride, W / stride]; the involution has a quarter of them.
        stride: Stride.
        kernel_size: Side K of the involution kernel.
        downsample: Projection of the shortcut; None for the identity.
        drop_path: Stochastic depth; None for none.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        stride: int,
        kernel_size: int,
        downsample: nn.Module | None,
        drop_path: nn.Module | None,
    ) -> None:
        super().__init__()
        mid = width // EXPANSION
        self.conv1 = nn.Conv2d(in_width, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = Involution2d(mid, kernel_size, stride, group_channels=GROUP_CHANNELS)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = batch_norm_relu(self.bn1, self.conv1(x))
        x = batch_norm_relu(self.bn2, self.conv2(x))
        return add_shortcut(self.bn3, self.conv3(x), shortcut, self.drop_path)


class RedNet(StagedNet):
    """An involution network of any size, from the published RedNets down to one for 32-pixel images.

    Args:
        depths: Blocks of each stage.
        widths: Output channels of each stage; multiples of 64 (16 channels a group in a bottleneck of a quarter).
        strides: Stride of each stage.
        stem_width: Channels after the stem; a multiple of 32.
        stem_stride: Stride of the stem's first convolution.
        stem_pool: Whether a 3x3 stride-2 max-pool follows the stem.
        kernel_size: Side of the involution kernels in the stages; odd.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head out.
        global_pool: timm's pooling name, or ``""`` for none.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block.
        zero_init_last: Start each block as its shortcut.

    Raises:
        UserError: Widths that do not divide into groups, an even kernel, or stage lists of different lengths.
    """

    def __init__(
        self,
        depths: Sequence[int] = BLOCKS[50],
        widths: Sequence[int] = (256, 512, 1024, 2048),
        strides: Sequence[int] = (1, 2, 2, 2),
        stem_width: int = 64,
        stem_stride: int = 2,
        stem_pool: bool = True,
        kernel_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
    ) -> None:
        if any(width < 1 or width % (GROUP_CHANNELS * EXPANSION) for width in widths):
            raise UserError(f"widths {tuple(widths)} must be multiples of {GROUP_CHANNELS * EXPANSION}")

        def block(
            in_width: int, width: int, stride: int, shortcut: nn.Module | None, drop_path: nn.Module | None
        ) -> nn.Module:
            return InvolutionBottleneck(in_width, width, stride, kernel_size, shortcut, drop_path)

        super().__init__(
            stem=involution_stem(in_chans, stem_width, stem_stride),
            stem_width=stem_width,
            stem_stride=stem_stride,
            stem_pool=stem_pool,
            stages=build_stages(block, stem_width, widths, depths, strides, drop_path_rate),
            widths=widths,
            strides=strides,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.init_weights(zero_init_last)


def create_rednet(variant: str, pretrained: bool = False, **arguments: Any) -> RedNet:
    """Build a registered RedNet with any of the class's arguments changed."""
    return create_staged(RedNet, variant, pretrained, len(arguments["depths"]), arguments)


default_cfgs = generate_default_cfgs(
    {f"rednet{depth}.untrained": default_cfg(224, "stem.0.conv", pool_size=(7, 7)) for depth in BLOCKS}
)


@register_model
def rednet26(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-26, 9.2 M parameters."""
    return create_rednet("rednet26", pretrained, **{"depths": BLOCKS[26], **kwargs})


@register_model
def rednet38(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-38, 12.4 M parameters."""
    return create_rednet("rednet38", pretrained, **{"depths": BLOCKS[38], **kwargs})


@register_model
def rednet50(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-50, 15.5 M parameters."""
    return create_rednet("rednet50", pretrained, **{"depths": BLOCKS[50], **kwargs})


@register_model
def rednet101(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-101, 25.7 M parameters: the paper's involution teacher."""
    return create_rednet("rednet101", pretrained, **{"depths": BLOCKS[101], **kwargs})


@register_model
def rednet152(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-152, 34.0 M parameters."""
    return create_rednet("rednet152", pretrained, **{"depths": BLOCKS[152], **kwargs})
