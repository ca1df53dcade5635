"""A student that answers by its class token alone: the same logits, without the work that they do not depend on.

- In the last block only the class token's row is computed. With one query its keys and values need not be made either:
  q·(W x) = (Wᵀ q)·x for keys, and the values' projection goes behind the weighted sum.
- The other tokens' heads are left out; the class token and the learned ones are added to their positions beforehand.
- Aligned stems share one projection: patches are the sum of what the stems' projections make, which is one matrix
  product over all their channels. A token is the mean of its own stem's projection, so the mean comes first, and one
  vector an image is projected.
- Batch norm is folded into the stems' convolutions.
- In float32 on a CPU linear layers are oneDNN's, with GELU in the same pass.
- On a CPU a batch goes through a few images at a time, so that what is made of them stays in its caches.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from coadvise.models.folding import fold_batch_norms, sample_images
from coadvise.models.stems import AlignedPatchEmbed

if TYPE_CHECKING:
    from coadvise.models.student import Student

# Values of an MLP's hidden layer, a block's largest tensor, that are made at a time on a CPU: 5 MB in float32, four
# images of 224 pixels at width 384. More would leave its caches, in memory that the system hands over anew each time.
# Autocast rounds every weight anew for each piece, so its pieces are larger.
CHUNK, AUTOCAST_CHUNK = 1_250_000, 5_000_000
# Multiplications from which oneDNN is taken: a call takes some microseconds more than one of MKL, PyTorch's own.
ONEDNN_FROM = 10_000_000
# PyTorch's own compiler calls it, no public function does. None where a build has no oneDNN, or another name for it.
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class ClassAnswer(nn.Module):
    """Maps normalised images [B, C, H, W] to the class token's logits [B, K]; made by ``Student.for_inference``.

    Args:
        student: Is copied, not changed.
    """

    prefix: Tensor
    place: Tensor
    positions: Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        plain = copy.deepcopy(student).eval().requires_grad_(False)
        assert plain.cls_token is not None
        assert plain.pos_embed is not None
        aligned = isinstance(plain.patch_embed, AlignedPatchEmbed)
        self.patch_embed = SharedStems(plain.patch_embed, plain.in_chans) if aligned else plain.patch_embed
        self.grid_size = plain.patch_embed.grid_size
        self.dynamic_img_size = plain.dynamic_img_size
        self.blocks = plain.blocks[:-1]
        for block in self.blocks:
            block.attn.qkv, block.attn.proj = Linear(block.attn.qkv), Linear(block.attn.proj)
            block.mlp.fc1, block.mlp.act = Linear(block.mlp.fc1, gelu=True), nn.Identity()
            block.mlp.fc2 = Linear(block.mlp.fc2)
        self.last = ClassTokenBlock(plain.blocks[-1])
        self.norm, self.head = plain.norm, plain.head
        self.patch_size = plain.patch_embed.patch_size
        count = plain.num_prefix_tokens
        prefix, place = plain.pos_embed[:, :count].clone(), plain.pos_embed.new_zeros(count, len(plain.aligned))
        prefix[:, 0] += plain.cls_token[:, 0]
        for i, name in enumerate(plain.learned_names):
            assert plain.reg_token is not None
            prefix[:, 1 + plain.token_names.index(name)] += plain.reg_token[:, i]
        for i, name in enumerate(plain.aligned):
            place[1 + plain.token_names.index(name), i] = 1
        self.register_buffer("prefix", prefix)  # [1, 1 + T, D]; aligned tokens are yet to be added
        self.register_buffer("place", place)  # [1 + T, stems]: which row is which stem's
        self.register_buffer("positions", plain.pos_embed[:, count:].clone())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._answer(x)
        patches = x.shape[-2] * x.shape[-1] // (self.patch_size[0] * self.patch_size[1])
        hidden = (self.prefix.shape[1] + patches) * self.last.mlp.fc1.out_features
        chunk = AUTOCAST_CHUNK if torch.is_autocast_enabled("cpu") else CHUNK
        return torch.cat([self._answer(images) for images in x.split(max(1, chunk // hidden))])

    def _answer(self, x: Tensor) -> Tensor:
        prefix = self.prefix
        if isinstance(self.patch_embed, SharedStems):
            patches, tokens = self.patch_embed(x)
            prefix = prefix + self.place @ tokens
        else:
            patches = self.patch_embed(x)
            prefix = prefix.expand(x.shape[0], -1, -1)
        positions = self.positions
        if self.dynamic_img_size:  # then patches are [B, H', W', D]
            grid = list(patches.shape[1:3])
            positions = resample_abs_pos_embed(positions, grid, list(self.grid_size), num_prefix_tokens=0)
            patches = patches.flatten(1, 2)
        x = self.blocks(torch.cat([prefix, patches + positions], dim=1))
        return self.head(self.norm(self.last(x)))


class ClassTokenBlock(nn.Module):
    """A transformer block's first row: tokens [B, N, D] to the class token [B, D].

    Args:
        block: timm's block without layer scale and without norms of queries and keys, as a student's are.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.proj, self.heads, self.scale = block.attn.proj, block.attn.num_heads, block.attn.scale
        query, key, value = block.attn.qkv.weight.chunk(3)
        of_query, _, of_value = block.attn.qkv.bias.chunk(3)
        self.query, self.query_bias = nn.Parameter(query.clone()), nn.Parameter(of_query.clone())
        # The keys' bias adds the same to every score, which the softmax takes out again.
        self.key = nn.Parameter(key.unflatten(0, (self.heads, -1)).clone())  # [heads, d, D]
        self.value = nn.Parameter(value.unflatten(0, (self.heads, -1)).mT.contiguous())  # [heads, D, d]
        self.value_bias = nn.Parameter(of_value.clone())  # weights sum to 1, so it is added once
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query = (
            F.linear(y[:, 0], self.query, self.query_bias).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        )  # [heads, B, d]
        query = (query @ self.key).transpose(0, 1) * self.scale  # [B, heads, D]
        weights = (query @ y.mT).softmax(dim=-1)  # [B, heads, N]
        mixed = (weights @ y).transpose(0, 1) @ self.value  # [heads, B, d]
        x = x[:, 0] + self.proj(mixed.transpose(0, 1).flatten(1) + self.value_bias)
        return x + self.mlp(self.norm2(x))


class SharedStems(nn.Module):
    """An aligned patch embedding whose stems share one projection.

    Maps images [B, C, H, W] to patches, [B, N, D] or [B, H', W', D] as the embedding it is made of, and tokens
    [B, stems, D] in the order of its stems.

    Args:
        embed: Is taken apart.
        in_chans: Image channels C.
    """

    def __init__(self, embed: AlignedPatchEmbed, in_chans: int) -> None:
        super().__init__()
        sample = sample_images(in_chans, 2 * embed.patch_size[0])
        projections = [cast(nn.Conv2d, stem.get_submodule("proj")) for stem in embed.stems.values()]
        self.side = projections[0].kernel_size[0]
        weight = torch.stack([conv.weight.permute(0, 2, 3, 1).flatten(1) for conv in projections], dim=1)
        self.weight = nn.Parameter(weight, requires_grad=False)  # [D, stems, side * side * 64]
        bias = torch.stack([cast(Tensor, conv.bias) for conv in projections])
        self.bias = nn.Parameter(bias, requires_grad=False)  # [stems, D]
        self.stems = nn.ModuleList(fold_batch_norms(stem, sample.to(weight)) for stem in embed.stems.values())
        for stem in self.stems:
            stem.set_submodule("proj", nn.Identity())
        embed.stems = nn.ModuleDict()
        self.embed = embed  # checks and pads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed.checked(x).contiguous(memory_format=torch.channels_last)
        pixels = torch.stack([self._patches(stem(x)) for stem in self.stems], dim=3)
        pixels = pixels.flatten(4)  # [B, H', W', stems, side * side * 64]
        # A mean of bfloat16 widens all of it first, which takes four times as long; a sum widens as it goes.
        means = pixels.sum(dim=(1, 2)) / (pixels.shape[1] * pixels.shape[2])
        tokens = torch.einsum("bsf,dsf->bsd", means, self.weight) + self.bias
        patches = linear(pixels.flatten(3), self.weight.flatten(1), self.bias.sum(0))
        return patches if self.embed.output_fmt is not None else patches.flatten(1, 2), tokens

    def _patches(self, x: Tensor) -> Tensor:
        """Cut [B, 64, h, w] into what each patch of the projection covers: [B, H', W', side, side, 64], a view."""
        x = x.permute(0, 2, 3, 1).unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))
        return x.transpose(2, 3)


class Linear(nn.Module):
    """A frozen linear layer [..., in] to [..., out], with GELU behind it if wanted, by `linear`."""

    def __init__(self, layer: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.gelu = layer.weight, layer.bias, gelu

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, gelu=self.gelu)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """`F.linear`, and GELU behind it if wanted."""
    if (
        _onednn_linear is not None
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] > ONEDNN_FROM
        and not x.requires_grad  # it has no gradient
        and not torch.is_autocast_enabled("cpu")
    ):
        y: Tensor = _onednn_linear(x, weight, bias, "gelu" if gelu else "none", [], "none")
        return y
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y
