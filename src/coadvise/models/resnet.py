"""ResNet of basic blocks: a convolution teacher for small images, and ResNet-10 as a student."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from coadvise.models.staged import ConvBNReLU, StagedNet, add_shortcut, build_stages
from coadvise.ops import batch_norm_relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them, under the names that timm's block has.

    Args:
        in_width: Channels of the input [B, in_width, H, W].
        width: Channels of the output [B, width, H / stride, W / stride].
        stride: Stride of the first convolution.
        downsample: Projection of the shortcut; None for the identity.
        drop_path: Stochastic depth; None for none.
    """

    def __init__(
        self, in_width: int, width: int, stride: int, downsample: nn.Module | None, drop_path: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = batch_norm_relu(self.bn1, self.conv1(x))
        return add_shortcut(self.bn2, self.conv2(x), shortcut, self.drop_path)


class BasicResNet(StagedNet):
    """A ResNet of basic blocks behind one convolution (He et al., CVPR 2016).

    As it stands for small images (their section 4.2, but wider and shallower); with a stem of 7x7, stride 2 and pooling
    for large ones.

    Args:
        widths: Output channels of each stage; the stem has the first.
        depths: Blocks of each stage.
        strides: Stride of each stage.
        stem_kernel: Side of the stem's convolution; odd.
        stem_stride: Stride of the stem's convolution.
        stem_pool: Whether a 3x3 stride-2 max-pool follows the stem.
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
        stem_kernel: int = 3,
        stem_stride: int = 1,
        stem_pool: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__(
            stem=ConvBNReLU(in_chans, widths[0], stem_kernel, stem_stride),
            stem_width=widths[0],
            stem_stride=stem_stride,
            stem_pool=stem_pool,
            stages=build_stages(BasicBlock, widths[0], widths, depths, strides, drop_path_rate),
            widths=widths,
            strides=strides,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.init_weights(zero_init_last)
