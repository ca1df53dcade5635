"""Token inductive bias alignment: patches and tokens from stems with their teachers' inductive biases (Co-advise).

Each aligned token has a stem of its teacher's kind. The patches are the sum of all stems' outputs, and the token is the
mean of its own stem's output over all positions, so a token starts from what its teacher's kind of layer sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod
from typing import ClassVar

import torch
from timm.layers.format import Format, nchw_to
from torch import Tensor, nn
from torch.nn import functional as F

from coadvise.errors import UserError
from coadvise.models.rednet import involution_stem, overlapping_kernel
from coadvise.ops import FusedSequential

WIDTH = 64  # channels of a stem before its projection

# Above this patch size a stem's first convolution halves the image, as published for 16. Up to it that would lose the
# detail of small images: there a later convolution halves it, or none where the patch is odd.
SMALL_PATCH = 4
PUBLISHED_STRIDES = 2, 1


def stem_strides(patch_size: int) -> tuple[int, int]:
    """Return the strides of a stem's first convolution and of the later one that may halve the image."""
    if patch_size % 2:
        return 1, 1
    return (1, 2) if patch_size <= SMALL_PATCH else PUBLISHED_STRIDES


def _checked_strides(patch_size: int, strides: Sequence[int] | None) -> tuple[int, int]:
    """The given strides, or those of the patch size. Raises UserError for ones that do not divide a patch."""
    found = stem_strides(patch_size) if strides is None else tuple(strides)
    if len(found) != 2 or min(found) < 1 or patch_size % prod(found):
        raise UserError(f"stem_strides {found} must be two numbers whose product divides the patch of {patch_size}")
    return found[0], found[1]


class ConvStem(nn.Module):
    """Convolution stem: three convolutions with batch norm and ReLU, then one convolution that cuts the patches.

    As published for patches of 16: 7x7 stride 2 to 64 channels, two of 3x3, then 8x8 stride 8 to ``embed_dim``.
    For small patches (4 or less): 3x3 to 32 channels, 3x3 stride 2 to 64, 3x3, then p/2 x p/2 stride p/2. Other strides
    are of the first two convolutions; those that follow have a quarter of the work each time the image is halved.

    Args:
        patch_size: Side p of a patch in pixels.
        in_chans: Image channels.
        embed_dim: Width D of a token; the output is [B, D, H / p, W / p].
        strides: Of the first two convolutions; their product divides p. None: as above.

    Raises:
        UserError: Strides that do not divide a patch.
    """

    first_conv: ClassVar = "conv.0"

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        first, second = _checked_strides(patch_size, strides)
        published = (first, second) == PUBLISHED_STRIDES
        width, kernel = (WIDTH, 7) if published else (WIDTH // 2, overlapping_kernel(first))
        self.conv = FusedSequential(
            *_conv_bn_relu(in_chans, width, kernel, first),
            *_conv_bn_relu(width, WIDTH, 3, second),
            *_conv_bn_relu(WIDTH, WIDTH, 3, 1),
        )
        self.proj = _projection(embed_dim, patch_size // (first * second))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv(x))


class InvolutionStem(nn.Module):
    """Involution stem: the stem of RedNet, then one convolution that cuts the patches.

    As published for patches of 16: 64 channels at stride 2, then 8x8 stride 8 to ``embed_dim``. For small patches
    (4 or less) its last convolution has the stride instead of its first.

    Args:
        patch_size: Side p of a patch in pixels.
        in_chans: Image channels.
        embed_dim: Width D of a token; the output is [B, D, H / p, W / p].
        strides: Of the first and the last convolution; their product divides p. None: as above.

    Raises:
        UserError: Strides that do not divide a patch.
    """

    first_conv: ClassVar = "stem.0.conv"

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        first, last = _checked_strides(patch_size, strides)
        self.stem = involution_stem(in_chans, WIDTH, first, last)
        self.proj = _projection(embed_dim, patch_size // (first * last))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.stem(x))


def _conv_bn_relu(in_chans: int, out_chans: int, kernel_size: int, stride: int) -> tuple[nn.Module, ...]:
    """Three modules in a row, not one: so are the published stem's keys."""
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_chans), nn.ReLU(inplace=True)


def _projection(embed_dim: int, side: int) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, embed_dim, side, side)


STEMS: dict[str, type[ConvStem] | type[InvolutionStem]] = {"conv": ConvStem, "inv": InvolutionStem}


class AlignedPatchEmbed(nn.Module):
    """Patches as the sum of all stems, and each aligned token as the mean of its own stem's output.

    Takes the place of timm's ``PatchEmbed`` in a vision transformer, and keeps its attributes.

    Args:
        img_size: Height and width of the images, in pixels.
        patch_size: Side of a patch, in pixels.
        in_chans: Image channels.
        embed_dim: Width D of a token.
        aligned: Token name to kind of stem, a key of ``STEMS``.
        stem_strides: Of each stem's two convolutions that may halve the image; None: those of the patch size.
        strict_img_size: Accept images of ``img_size`` only; otherwise any whole number of patches.
        dynamic_img_pad: Pad images at the right and the bottom to whole patches.
        output_fmt: ``"NHWC"`` for patches as [B, H / p, W / p, D]; None for [B, patches, D].

    Raises:
        UserError: No stem, an unknown kind, strides that do not divide a patch, or an image that is not a whole number
            of patches.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        *,
        aligned: Mapping[str, str],
        stem_strides: Sequence[int] | None = None,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        output_fmt: str | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(aligned.values()) - set(STEMS))
        if unknown or not aligned:
            raise UserError(f"aligned={dict(aligned)} must map token names to kinds of stem: {list(STEMS)}")
        self.patch_size = _pair(patch_size)
        if self.patch_size[0] != self.patch_size[1]:
            raise UserError(f"patch_size {patch_size} must be square for aligned tokens")
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.output_fmt = None if output_fmt is None else Format(output_fmt)
        self.stems = nn.ModuleDict(
            {name: STEMS[kind](self.patch_size[0], in_chans, embed_dim, stem_strides) for name, kind in aligned.items()}
        )
        self.img_size = _pair(img_size)
        self.set_input_size(self.img_size)

    @property
    def num_patches(self) -> int:
        """Patches of an image of ``img_size``."""
        return self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Set the image size; the weights do not depend on it.

        Raises:
            UserError: Another patch size, or an image that is not a whole number of patches.
        """
        if patch_size is not None and _pair(patch_size) != self.patch_size:
            raise UserError(
                f"aligned stems are built for patches of {self.patch_size[0]}, got {patch_size}: create the model with "
                "the new patch_size instead"
            )
        size = self.img_size if img_size is None else _pair(img_size)
        if not self.dynamic_img_pad:
            self._check_whole(size)
        self.img_size = size
        self.grid_size = self.dynamic_feat_size(size)

    def _check_whole(self, size: tuple[int, int]) -> None:
        if size[0] % self.patch_size[0] or size[1] % self.patch_size[1]:
            raise UserError(f"image size {size} is not a whole number of patches of {self.patch_size[0]} pixels")

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the pixels a patch has on each side."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return how many patches an image of this size has, down and across."""
        pad = self.patch_size[0] - 1 if self.dynamic_img_pad else 0
        return (img_size[0] + pad) // self.patch_size[0], (img_size[1] + pad) // self.patch_size[1]

    def checked(self, x: Tensor) -> Tensor:
        """Return images as the stems take them, padded to whole patches where the model was built so.

        Raises:
            UserError: An image of another size than the model's, or not a whole number of patches.
        """
        height, width = x.shape[-2:]
        if self.strict_img_size and (height, width) != self.img_size:
            raise UserError(
                f"image size {(height, width)} is not the model's {self.img_size}: resize, or set dynamic_img_size=True"
            )
        if self.dynamic_img_pad:
            p = self.patch_size[0]
            return F.pad(x, (0, -width % p, 0, -height % p))
        self._check_whole((height, width))
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Embed images [B, C, H, W] as patches [B, N, D] (or [B, H', W', D]) and a token [B, 1, D] a stem.

        Raises:
            UserError: An image of another size than the model's, or not a whole number of patches.
        """
        x = self.checked(x)
        maps = {name: stem(x) for name, stem in self.stems.items()}  # each [B, D, H', W']
        patches = reduce(torch.add, maps.values())
        tokens = {name: y.mean(dim=(2, 3)).unsqueeze(1) for name, y in maps.items()}
        if self.output_fmt is not None:
            return nchw_to(patches, self.output_fmt), tokens
        return patches.flatten(2).transpose(1, 2), tokens


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
