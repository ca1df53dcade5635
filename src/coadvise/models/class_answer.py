"""A student for inference: the class token's logits, without the work that they do not depend on.

- In the last block only the class token's row is computed. One query needs no keys and values:
  q·(W x) = (Wᵀ q)·x for keys, and the values' projection comes after the weighted sum.
- The other tokens' heads are left out; the class token and learned tokens are added to their positions beforehand.
- Batch norm is folded into the convolutions of aligned stems.
- On a CPU a batch goes through a few images at a time, so that their activations reuse the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Values of an MLP's hidden layer, a block's largest tensor, that a CPU computes at a time: eight images of 224 pixels
# at width 384. A batch of 64 takes a fifth less time than in one piece, which takes new memory each time.
CHUNK_VALUES = 2_500_000


class ClassAnswer(nn.Module):
    """Maps normalised images [B, C, H, W] to the class token's logits [B, num_classes].

    ``Student.for_inference`` makes it. Everything in it is frozen and in evaluation mode.

    Args:
        model: A vision transformer whose blocks are timm's, without layer scale and query and key norms. Its parts are
            taken, not copied, and batch norms in its patch embedding are folded.
        prefix: The tokens before the patches with their positions added, [1, 1 + T, D].
        aligned: The row in ``prefix`` that each aligned token of the patch embedding is added to, by token name.
    """

    prefix: Tensor
    positions: Tensor

    def __init__(self, model: VisionTransformer, prefix: Tensor, aligned: Mapping[str, int]) -> None:
        super().__init__()
        fold_batch_norms(model.patch_embed)
        model.patch_embed.to(memory_format=torch.channels_last)  # in which its convolutions are faster
        self.patch_embed, self.norm, self.head = model.patch_embed, model.norm, model.head
        self.blocks, self.last = model.blocks[:-1], ClassTokenBlock(model.blocks[-1])
        self.aligned = dict(aligned)
        self.dynamic_img_size = model.dynamic_img_size
        self.hidden = model.blocks[-1].mlp.fc1.out_features
        self.register_buffer("prefix", prefix)
        self.register_buffer("positions", model.pos_embed[:, prefix.shape[1] :].clone())  # [1, N, D]
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._logits(x)
        patches = x.shape[-2] * x.shape[-1] // self.patch_embed.feat_ratio() ** 2
        chunk = CHUNK_VALUES // (self.hidden * (self.prefix.shape[1] + patches))
        return torch.cat([self._logits(images) for images in x.split(max(1, chunk))])

    def _logits(self, x: Tensor) -> Tensor:
        embedded = self.patch_embed(x)
        patches, tokens = embedded if isinstance(embedded, tuple) else (embedded, {})
        rows = list(self.prefix.expand(x.shape[0], -1, -1).split(1, dim=1))
        for name, row in self.aligned.items():
            rows[row] = rows[row] + tokens[name]
        positions = self.positions
        if self.dynamic_img_size:  # then patches are [B, H', W', D]
            grid, own = list(patches.shape[1:3]), list(self.patch_embed.grid_size)
            positions = resample_abs_pos_embed(positions, grid, own, num_prefix_tokens=0)
            patches = patches.flatten(1, 2)
        x = self.blocks(torch.cat([*rows, patches + positions], dim=1))
        return self.head(self.norm(self.last(x)))


class ClassTokenBlock(nn.Module):
    """A transformer block's first row: tokens [B, N, D] to the class token [B, D].

    Args:
        block: timm's block without layer scale and without norms of queries and keys.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.proj, self.heads, self.scale = block.attn.proj, block.attn.num_heads, block.attn.scale
        query, key, value = block.attn.qkv.weight.chunk(3)
        of_query, _, of_value = block.attn.qkv.bias.chunk(3)
        self.query, self.query_bias = nn.Parameter(query.clone()), nn.Parameter(of_query.clone())
        # The keys' bias adds the same to every score, and the softmax removes it.
        self.key = nn.Parameter(key.unflatten(0, (self.heads, -1)).clone())  # [heads, d, D]
        self.value = nn.Parameter(value.unflatten(0, (self.heads, -1)).mT.contiguous())  # [heads, D, d]
        self.value_bias = nn.Parameter(of_value.clone())  # weights sum to 1, so it is added once

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query = F.linear(y[:, 0], self.query, self.query_bias)
        query = query.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # [heads, B, d]
        query = (query @ self.key).transpose(0, 1) * self.scale  # [B, heads, D]
        weights = (query @ y.mT).softmax(dim=-1)  # [B, heads, N]
        mixed = (weights @ y).transpose(0, 1) @ self.value  # [heads, B, d]
        x = x[:, 0] + self.proj(mixed.transpose(0, 1).flatten(1) + self.value_bias)
        return x + self.mlp(self.norm2(x))


def fold_batch_norms(module: nn.Module) -> None:
    """Fold, in place, each batch norm into the convolution registered just before it; both in evaluation mode.

    For this package's stems, where the forward pass has the order of registration.
    """
    for parent in list(module.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
                parent.set_submodule(norm_name, nn.Identity())
