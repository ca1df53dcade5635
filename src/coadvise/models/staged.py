"""A classifier in stages, and timm's model contract for it, in one place for all teachers of this project.

A network is ``stem``, ``maxpool`` (or nothing), ``layer1`` .. ``layerN``, a global pool and the linear head ``fc``: the
names of ResNet, so that published RedNet checkpoints load under their own keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from timm.layers.classifier import create_classifier
from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from coadvise.errors import UserError
from coadvise.ops import FusedSequential, batch_norm_relu

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BlockFactory = Callable[[int, int, int, nn.Module | None, nn.Module | None], nn.Module]
"""(input width, output width, stride, shortcut projection or None, drop path or None) -> one residual block."""


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU; [B, C, H, W] -> [B, C', H / stride, W / stride]."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm_relu(self.bn, self.conv(x))


def add_shortcut(norm: nn.Module, x: Tensor, shortcut: Tensor, drop_path: nn.Module | None) -> Tensor:
    """The end of a residual block, [B, C, H, W]: batch norm, stochastic depth if there is one, shortcut, ReLU."""
    if drop_path is None:
        return batch_norm_relu(norm, x, shortcut)
    return F.relu(drop_path(batch_norm_relu(norm, x, relu=False)) + shortcut, inplace=True)


def build_stages(
    block: BlockFactory,
    in_width: int,
    widths: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    drop_path_rate: float,
) -> list[nn.Sequential]:
    """Build the residual stages; the first block of a stage has its stride and, where shapes differ, a 1x1 shortcut.

    Args:
        block: Makes one block.
        in_width: Channels that the stem hands over.
        widths: Output channels of each stage.
        depths: Blocks of each stage.
        strides: Stride of each stage.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.

    Raises:
        UserError: The three lists differ in length, or a stage has no block.
    """
    if not len(widths) == len(depths) == len(strides) or not depths or min(depths) < 1:
        raise UserError(
            f"widths {tuple(widths)}, depths {tuple(depths)} and strides {tuple(strides)} need one entry a stage, "
            "at least one stage, and at least one block in each"
        )
    last = max(sum(depths) - 1, 1)
    rates = (drop_path_rate * i / last for i in range(sum(depths)))
    stages = []
    for width, depth, stage_stride in zip(widths, depths, strides, strict=True):
        blocks = []
        for i in range(depth):
            stride = stage_stride if i == 0 else 1
            shortcut = None
            if stride != 1 or in_width != width:
                shortcut = FusedSequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            rate = next(rates)
            blocks.append(block(in_width, width, stride, shortcut, DropPath(rate) if rate > 0 else None))
            in_width = width
        stages.append(nn.Sequential(*blocks))
    return stages


class StagedNet(nn.Module):
    """Stem, optional max-pool, stages, pooled linear head; subclasses build the parts.

    Args:
        stem: Module from [B, in_chans, H, W] to [B, stem_width, H / stem_stride, W / stem_stride].
        stem_width: Channels after the stem.
        stem_stride: Stride of the stem.
        stem_pool: Whether a 3x3 stride-2 max-pool follows the stem.
        stages: The residual stages, from ``build_stages``.
        widths: Output channels of each stage.
        strides: Stride of each stage.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head out.
        global_pool: timm's pooling name (``avg``, ``max``, ``avgmax``, ``catavgmax``), or ``""`` for none.
        drop_rate: Dropout before the head.

    Raises:
        UserError: No pooling but a head.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        stem_width: int,
        stem_stride: int,
        stem_pool: bool,
        stages: Sequence[nn.Sequential],
        widths: Sequence[int],
        strides: Sequence[int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.stem = stem
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if stem_pool else nn.Identity()
        self.feature_info: list[dict[str, Any]] = [{"num_chs": stem_width, "reduction": stem_stride, "module": "stem"}]
        reduction = stem_stride * (2 if stem_pool else 1)
        self.stage_names = tuple(f"layer{i + 1}" for i in range(len(stages)))
        for name, stage, width, stride in zip(self.stage_names, stages, widths, strides, strict=True):
            self.add_module(name, stage)
            reduction *= stride
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": name})
        self.num_features = widths[-1]
        self._build_head(num_classes, global_pool)

    def _build_head(self, num_classes: int, global_pool: str) -> None:
        if not global_pool and num_classes > 0:
            raise UserError(f"global_pool='' needs num_classes=0, got {num_classes}: the head reads pooled features")
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def init_weights(self, zero_init_last: bool = True) -> None:
        """He-initialise every convolution (fan out) as the published networks do, biases to zero.

        Args:
            zero_init_last: Zero the last norm of each block, so that each block starts as its shortcut.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if zero_init_last:
            for block in self._blocks():
                norms = [m for m in block.children() if isinstance(m, nn.BatchNorm2d)]
                nn.init.zeros_(norms[-1].weight)

    def _stages(self) -> list[nn.Sequential]:
        return [self.get_submodule(name) for name in self.stage_names]  # type: ignore[misc]

    def _blocks(self) -> list[nn.Module]:
        return [block for stage in self._stages() for block in stage]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return timm's parameter groups: the stem, then a group a stage (coarse) or a block."""
        return {"stem": r"^stem|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Return the names of weights that no decay applies to, beyond norms and biases: none."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the linear head (``nn.Identity`` without classes)."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one.

        Args:
            num_classes: Classes; 0 leaves the head out.
            global_pool: New pooling; None keeps the present one.
        """
        weight = next(self.parameters())
        self._build_head(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        self.fc.to(device=weight.device, dtype=weight.dtype)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def _stage(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the final features and those after the stem (index 0) and after each stage (1 .. N).

        Args:
            x: Images [B, C, H, W].
            indices: Which to return: the last n for an int, all for None.
            norm: For timm's signature; stages end in their own norm and ReLU.
            stop_early: Do not compute stages behind the last index.
            output_fmt: ``"NCHW"`` is the only one.
            intermediates_only: Leave out the final features.

        Raises:
            UserError: Another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt {output_fmt!r} is not supported, use 'NCHW'")
        take, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x)
        features = [x] if 0 in take else []
        x = self.maxpool(x)
        stages = self._stages()
        for i, stage in enumerate(stages[:last] if stop_early else stages, start=1):
            x = self._stage(stage, x)
            if i in take:
                features.append(x)
        return features if intermediates_only else (x, features)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to the last stage's features [B, num_features, H', W']."""
        x = self.maxpool(self.stem(x))
        for stage in self._stages():
            x = self._stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features [B, num_features, H', W'] and classify: [B, num_classes], or [B, head_hidden_size]."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def default_cfg(input_size: int, first_conv: str | tuple[str, ...], **overrides: Any) -> dict[str, Any]:
    """Return timm's pretrained configuration for a network that has no weights to download."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, input_size, input_size),
        "crop_pct": 0.875 if input_size >= 160 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": first_conv,
        "classifier": "fc",
        **overrides,
    }


NetT = TypeVar("NetT", bound=StagedNet)


def create_staged(cls: type[NetT], variant: str, pretrained: bool, stages: int, arguments: dict[str, Any]) -> NetT:
    """Build a registered network through timm, so that ``features_only``, ``pretrained_cfg`` and checkpoints work.

    Args:
        cls: The network's class.
        variant: Its registered name.
        pretrained: Whether to load weights; none are published under these names, so timm says what is missing.
        stages: Number of stages, from which ``features_only`` takes its default indices.
        arguments: The class's arguments.
    """
    feature_cfg = {"out_indices": tuple(range(stages + 1))}
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=feature_cfg, **arguments)
