"""A student that answers by its class token alone: the same logits, without the work that they do not depend on.

- In the last block only the class token's row is computed. With one query its keys and values need not be made either:
  q·(W x) = (Wᵀ q)·x for keys, and the values' projection goes behind the weighted sum.
- The other tokens' heads are left out; the class token and the learned ones are added to their positions beforehand.
- Batch norm is folded into the stems' convolutions.
- On a CPU linear layers are oneDNN's with GELU in the same pass, where that is faster, and the stems' convolutions
  with ReLU; those of 3x3 are ours, but not in bfloat16 where there is AMX, and so is attention in float32.
- On a CPU a batch goes through a few images at a time, so that what is made of them stays in its caches. Under autocast
  weights are rounded once, not for each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coadvise.models.folding import fold_batch_norms, sample_images
from coadvise.models.staged import ConvBNReLU
from coadvise.models.stems import AlignedPatchEmbed
from coadvise.ops import attention, convolution, onednn

if TYPE_CHECKING:
    from coadvise.models.student import Student

# Bytes of an MLP's hidden layer, a block's largest tensor, that are made at a time on a CPU: in float32 four images of
# 224 pixels at width 384. More would leave its caches, in memory that the system hands over anew each time.
CHUNK = 5_000_000


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
        self.patch_embed = Stems(plain.patch_embed, plain.in_chans) if aligned else plain.patch_embed
        self.grid_size = plain.patch_embed.grid_size
        self.dynamic_img_size = plain.dynamic_img_size
        self.hidden = plain.blocks[-1].mlp.fc1.out_features
        self.blocks = plain.blocks[:-1]
        for block in self.blocks:
            block.attn, block.mlp = FrozenAttention(block.attn), frozen_mlp(block.mlp)
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
        self._compile: Callable[..., Any] | None = None  # what `compile` asked for
        self._compiled: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None
        self._rounded: tuple[tuple[Any, ...], list[Tensor], ClassAnswer] | None = None  # of which, and the copy
        self.eval()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile this module in place, with `torch.compile`'s arguments.

        On a CPU that is what a piece of a batch goes through behind the stems, whose convolutions are slower in a
        graph. `torch.compile` of the module makes a graph of all of it, and of whole batches.
        """
        self._compile_with(partial(torch.compile, *args, **kwargs))

    def _compile_with(self, compile_: Callable[..., Any]) -> None:
        self._compile, self._rounded = compile_, None
        self._compiled = compile_(self._answer), compile_(self._behind)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made of it, as other modules are copied and pickled."""
        return {**super().__getstate__(), "_compile": None, "_compiled": None, "_rounded": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._rounded = None  # of weights made in inference mode nothing else shows that they have changed
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        answer, behind = self._compiled or (self._answer, self._behind)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return answer(x)
        if torch.is_autocast_enabled("cpu") and (rounded := self._rounded_copy()) is not self:
            return rounded(x)
        patches = x.shape[-2] * x.shape[-1] // (self.patch_size[0] * self.patch_size[1])
        hidden = (self.prefix.shape[1] + patches) * self.hidden * onednn.precision(x).itemsize
        return torch.cat([behind(*self._embed(images)) for images in x.split(max(1, CHUNK // hidden))])

    def _rounded_copy(self) -> ClassAnswer:
        """This module with its layers in autocast's dtype, made anew when a weight has changed; itself if it is so."""
        dtype = torch.get_autocast_dtype("cpu")
        if all(weight.dtype in (dtype, torch.float64) for _, _, weight in _rounded_weights(self)):
            return self  # autocast leaves float64 alone
        weights = [*self.parameters(), *self.buffers()]
        if any(weight.requires_grad for weight in weights):  # a copy's would get the gradient
            return self
        of = (dtype, *((id(w), w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights))
        if self._rounded is None or self._rounded[0] != of:
            with torch.inference_mode(False), torch.no_grad():  # a later call may want a gradient
                made = copy.deepcopy(self)
                for layer, name, weight in list(_rounded_weights(made)):
                    setattr(layer, name, nn.Parameter(weight.to(dtype), requires_grad=False))
            if self._compile is not None:
                made._compile_with(self._compile)
            self._rounded = of, weights, made  # weights that are kept alive keep their identity
        return self._rounded[2]

    def _answer(self, x: Tensor) -> Tensor:
        return self._behind(*self._embed(x))

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to tokens before the patches, [B, 1 + T, D], and patches, [B, N, D] or [B, H', W', D]."""
        if isinstance(self.patch_embed, Stems):
            patches, tokens = self.patch_embed(x)
            return self.prefix + self.place @ tokens, patches
        return self.prefix.expand(x.shape[0], -1, -1), self.patch_embed(x)

    def _behind(self, prefix: Tensor, patches: Tensor) -> Tensor:
        positions = self.positions
        if self.dynamic_img_size:  # then patches are [B, H', W', D]
            grid = list(patches.shape[1:3])
            positions = resample_abs_pos_embed(positions, grid, list(self.grid_size), num_prefix_tokens=0)
            patches = patches.flatten(1, 2)
        x = self.blocks(torch.cat([prefix, patches + positions], dim=1))
        return self.head(self.norm(self.last(x)))


def _rounded_weights(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters that autocast rounds, all but those of norms: each with its owner and its name there."""
    for layer in module.modules():
        if not isinstance(layer, nn.LayerNorm | _BatchNorm):
            for name, weight in layer.named_parameters(recurse=False):
                yield layer, name, weight


class ClassTokenBlock(nn.Module):
    """A transformer block's first row: tokens [B, N, D] to the class token [B, D].

    Args:
        block: timm's block without layer scale and without norms of queries and keys, as a student's are.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, frozen_mlp(block.mlp)
        self.proj, self.heads, self.scale = Linear(block.attn.proj), block.attn.num_heads, block.attn.scale
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
        query = onednn.linear(y[:, 0], self.query, self.query_bias)
        query = query.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # [heads, B, d]
        query = (query @ self.key).transpose(0, 1) * self.scale  # [B, heads, D]
        weights = (query @ y.mT).softmax(dim=-1)  # [B, heads, N]
        mixed = (weights @ y).transpose(0, 1) @ self.value  # [heads, B, d]
        x = x[:, 0] + self.proj(mixed.transpose(0, 1).flatten(1) + self.value_bias)
        return x + self.mlp(self.norm2(x))


class Stems(nn.Module):
    """An aligned patch embedding made for inference.

    Maps images [B, C, H, W] to patches, [B, N, D] or [B, H', W', D] as the embedding it is made of, and tokens
    [B, stems, D] in the order of its stems.

    Args:
        embed: Is taken apart.
        in_chans: Image channels C.
    """

    def __init__(self, embed: AlignedPatchEmbed, in_chans: int) -> None:
        super().__init__()
        sample = sample_images(in_chans, 2 * embed.patch_size[0]).to(next(embed.parameters()))
        self.stems = nn.ModuleList(fold_batch_norms(stem, sample) for stem in embed.stems.values())
        self.projections = nn.ModuleList()
        for stem in self.stems:
            conv = cast(nn.Conv2d, stem.get_submodule("proj"))  # its patches do not overlap: one matrix product
            self.side = conv.kernel_size[0]
            conv.weight = nn.Parameter(conv.weight.permute(0, 2, 3, 1).flatten(1), requires_grad=False)
            self.projections.append(Linear(conv))
            stem.set_submodule("proj", nn.Identity())
            fuse_relu(stem)
        embed.stems = nn.ModuleDict()
        self.embed = embed  # checks and pads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed.checked(x).contiguous(memory_format=torch.channels_last)
        made = [
            project(self._patches(stem(x)).flatten(3))
            for stem, project in zip(self.stems, self.projections, strict=True)
        ]  # [B, H', W', D] each
        tokens = torch.stack([patches.mean(dim=(1, 2)) for patches in made], dim=1)
        whole = reduce(add, made)
        return whole if self.embed.output_fmt is not None else whole.flatten(1, 2), tokens

    def _patches(self, x: Tensor) -> Tensor:
        """Cut [B, 64, h, w] into what each patch of the projection covers: [B, H', W', side, side, 64], a view."""
        x = x.permute(0, 2, 3, 1).unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))
        return x.transpose(2, 3)


def fuse_relu(stem: nn.Module) -> None:
    """Put `ConvReLU` where a convolution has a folded batch norm and a ReLU behind it."""
    for name, module in list(stem.named_modules()):
        if isinstance(module, ConvBNReLU) and isinstance(module.bn, nn.Identity):
            stem.set_submodule(name, ConvReLU(module.conv))
        elif isinstance(module, nn.Sequential):
            for i in range(len(module) - 2):
                conv, norm, relu = module[i], module[i + 1], module[i + 2]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.Identity) and isinstance(relu, nn.ReLU):
                    module[i], module[i + 2] = ConvReLU(conv), nn.Identity()


class ConvReLU(nn.Module):
    """A frozen convolution [B, C, H, W] to [B, C', h, w] with ReLU behind it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        self.is_3x3 = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and conv.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self.is_3x3 and _ours(x, conv.out_channels) and convolution.takes(x, conv.weight):
            return convolution.conv3x3_relu(x, conv.weight, cast(Tensor, conv.bias))
        return onednn.convolution_relu(x, conv)


class FrozenAttention(nn.Module):
    """timm's attention without norms and dropout, as a student has it: tokens [B, N, D] to [B, N, D]."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = Linear(attn.qkv), Linear(attn.proj), attn.num_heads

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        qkv = self.qkv(x)
        ours = _ours(qkv, x.shape[1]) and attention.takes(qkv, self.heads)
        answer: Tensor = self.proj((attention.attention if ours else attention.plain)(qkv, self.heads))
        return answer


class Linear(nn.Module):
    """A frozen linear layer [..., in] to [..., out], with GELU behind it if wanted."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, gelu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.gelu = layer.weight, layer.bias, gelu

    def forward(self, x: Tensor) -> Tensor:
        return onednn.linear(x, self.weight, self.bias, gelu=self.gelu)


def frozen_mlp(mlp: Mlp) -> nn.Sequential:
    """Timm's MLP with GELU, without dropout and norm, as a student has them."""
    return nn.Sequential(Linear(mlp.fc1, gelu=True), Linear(mlp.fc2))


def _ours(x: Tensor, products: int) -> bool:
    """Whether to take operators of our own."""
    return not onednn.exporting() and onednn.worthwhile(x, products)
