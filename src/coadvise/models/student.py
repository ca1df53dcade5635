"""The student: a vision transformer with a class token and one token per teacher, a linear head on each (Co-advise).

It is timm's ``VisionTransformer`` whose register tokens have names and heads, so everything that timm does with one, it
does with this. ``student(x)`` is the class token's answer, always; ``forward_tokens`` gives every token's, for training
and analysis.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.weight_init import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, cat, nn

from coadvise.advice import CLASS
from coadvise.errors import UserError
from coadvise.models.class_answer import ClassAnswer
from coadvise.models.staged import default_cfg
from coadvise.models.stems import STEMS, AlignedPatchEmbed
from coadvise.models.tokens import PAPER_TOKENS, TokenModel, check_token_names

PAPER_ALIGNMENT = {"conv": "conv", "inv": "inv"}


class Student(TokenModel, VisionTransformer):
    """Vision transformer over the sequence [class, named tokens, patches].

    Tokens in ``aligned`` are the mean of a stem of that kind, and the patches are the sum of those stems; the others
    are learned vectors. Without aligned tokens the patches are timm's linear patch embedding; without tokens it is a
    plain ViT.

    Args:
        img_size: Image height and width, in pixels.
        patch_size: Side of a patch, in pixels.
        in_chans: Image channels.
        num_classes: Classes of every head; 0 leaves all heads out.
        global_pool: ``"token"``, or ``""`` for the whole sequence before a head (then ``num_classes`` must be 0).
        token_names: One name a teacher, in the order of the tokens.
        aligned: Token name to kind of stem (``"conv"`` or ``"inv"``), for any of the tokens; None or an
            empty mapping for none (``create_model`` drops None, so there ``{}`` undoes a registered alignment).
        stem_strides: Of the two convolutions of each stem that may halve the image; None: those of the patch size.
            Without aligned tokens there is no stem, and they change nothing.
        embed_dim: Width D.
        depth: Blocks.
        num_heads: Attention heads a block.
        mlp_ratio: Hidden width of the MLPs over D.
        drop_rate: Dropout before the heads.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout after projections and in MLPs.
        attn_drop_rate: Dropout on attention weights.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        dynamic_img_size: Accept images of any whole number of patches; the position embedding is resampled.
        dynamic_img_pad: With it, pad images to whole patches.

    Raises:
        UserError: Token names or alignment that do not fit each other, or a pooling other than the two.
    """

    reg_token: nn.Parameter | None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["token", ""] = "token",
        token_names: Sequence[str] = PAPER_TOKENS,
        aligned: Mapping[str, str] | None = None,
        stem_strides: Sequence[int] | None = None,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
    ) -> None:
        names = check_token_names(token_names)
        aligned = dict(aligned or {})
        if stray := [name for name in aligned if name not in names]:
            raise UserError(f"aligned names {stray} are not among the tokens {list(names)}")
        _check_pool(global_pool, num_classes)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            reg_tokens=len(names),
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            embed_layer=partial(aligned_embed, aligned=aligned, stem_strides=stem_strides) if aligned else PatchEmbed,
        )
        self.in_chans = in_chans
        self.token_names = names
        self.aligned = aligned
        self.learned_names = tuple(name for name in names if name not in aligned)
        # Aligned tokens come from their stems: a learned vector for them would be a parameter without a gradient.
        if self.reg_token is not None and aligned:
            learned = len(self.learned_names)
            self.reg_token = nn.Parameter(self.reg_token[:, :learned].detach().clone()) if learned else None
        self._build_token_heads()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as timm's ViT, but the tokens as DeiT: at timm's 1e-6 all would start as the same vector."""
        super().init_weights(mode, needs_reset)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                trunc_normal_(token, std=0.02)

    def _build_token_heads(self) -> None:
        for name in self.token_names:
            self.add_module(f"head_{name}", self._new_head())

    def _new_head(self) -> nn.Linear | nn.Identity:
        if self.num_classes == 0:
            return nn.Identity()
        weight = next(self.parameters())
        head = nn.Linear(self.embed_dim, self.num_classes, device=weight.device, dtype=weight.dtype)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        head.train(self.training)
        return head

    def new_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the heads, the named tokens and their stems."""
        stems = self.patch_embed.parameters() if self.aligned else ()
        return [*super().new_parameters(), *([] if self.reg_token is None else [self.reg_token]), *stems]

    def no_weight_decay(self) -> set[str]:
        """Return the names of weights that no decay applies to, beyond norms and biases: tokens and positions."""
        return super().no_weight_decay() | {"reg_token"}

    def heads(self) -> dict[str, nn.Module]:
        """Return every token's head by name, the class token's first."""
        return {CLASS: self.head} | {name: self.get_submodule(f"head_{name}") for name in self.token_names}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all heads by fresh ones; 0 classes leave them out.

        Raises:
            UserError: A pooling that a student does not have.
        """
        _check_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)
        self.head = self._new_head()
        self._build_token_heads()

    def _pos_embed(self, x: Tensor | tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        """Concatenate [class, named tokens, patches] to [B, 1 + T + N, D], and add the position embedding."""
        patches, tokens = x if isinstance(x, tuple) else (x, {})
        batch = patches.shape[0]
        tokens = tokens | self._learned_tokens(batch)
        assert self.pos_embed is not None
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = resample_abs_pos_embed(
                pos_embed,
                new_size=list(patches.shape[1:3]),
                old_size=list(self.patch_embed.grid_size),
                num_prefix_tokens=self.num_prefix_tokens,
            )
            patches = patches.flatten(1, 2)
        return self.pos_drop(cat([*(tokens[name] for name in (CLASS, *self.token_names)), patches], dim=1) + pos_embed)

    def _learned_tokens(self, batch: int = 1) -> dict[str, Tensor]:
        """Return the tokens that are parameters, each [batch, 1, D], by name."""
        assert self.cls_token is not None
        # Expanded, then split: the other order sums gradients differently, in their last bits.
        learned = () if self.reg_token is None else self.reg_token.expand(batch, -1, -1).split(1, dim=1)
        return {CLASS: self.cls_token.expand(batch, -1, -1), **dict(zip(self.learned_names, learned, strict=True))}

    def forward_tokens(self, x: Tensor) -> dict[str, Tensor]:
        """Map images [B, C, H, W] to logits [B, num_classes] by token: ``"class"``, then ``token_names`` in order."""
        x = self.forward_features(x)
        return {name: head(self.head_drop(x[:, i])) for i, (name, head) in enumerate(self.heads().items())}

    def for_inference(self) -> ClassAnswer:
        """Return a frozen copy that maps images to the class token's logits alone, faster, equal to float error.

        Raises:
            UserError: A student that gives the whole sequence (``global_pool=""``).
        """
        _check_pool(self.global_pool or "none", self.num_classes)
        model = copy.deepcopy(self).eval().requires_grad_(False)
        assert model.pos_embed is not None
        names, learned = (CLASS, *model.token_names), model._learned_tokens()
        positions = model.pos_embed[:, : len(names)].split(1, dim=1)
        rows = [position + learned.get(name, 0) for name, position in zip(names, positions, strict=True)]
        return ClassAnswer(model, cat(rows, dim=1), {name: names.index(name) for name in model.aligned})


def aligned_embed(
    *,
    aligned: Mapping[str, str],
    bias: bool,
    device: Any,
    dtype: Any,
    stem_strides: Sequence[int] | None = None,
    **arguments: Any,
) -> AlignedPatchEmbed:
    """Aligned stems as the ``embed_layer`` of timm's ``VisionTransformer``, which gives them these arguments."""
    # timm's ViT passes these three to its own patch embedding; a student never sets them.
    return AlignedPatchEmbed(aligned=aligned, stem_strides=stem_strides, **arguments)


def _check_pool(global_pool: str, num_classes: int) -> None:
    if global_pool not in ("token", "") or (not global_pool and num_classes > 0):
        raise UserError(
            f"global_pool={global_pool!r} with {num_classes} classes: a student's heads read their own tokens, so use "
            "'token', or '' with num_classes=0 for the whole sequence"
        )


def create_student(variant: str, pretrained: bool = False, **arguments: Any) -> Student:
    """Build a registered student through timm with any of the class's arguments changed."""
    names = check_token_names(arguments.get("token_names", PAPER_TOKENS))
    # timm looks these names up when a checkpoint has other classes or channels; they follow from the tokens.
    overlay: dict[str, Any] = {"classifier": ("head", *(f"head_{name}" for name in names))}
    if aligned := arguments.get("aligned"):
        overlay["first_conv"] = tuple(
            f"patch_embed.stems.{name}.{STEMS[kind].first_conv}" for name, kind in aligned.items() if kind in STEMS
        )
    return build_model_with_cfg(
        Student,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay | (arguments.pop("pretrained_cfg_overlay", None) or {}),
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **arguments,
    )


def student_cfg(img_size: int) -> dict[str, Any]:
    """Return timm's pretrained configuration of a student for images of this size."""
    return default_cfg(img_size, "patch_embed.proj", pool_size=None, fixed_input_size=True, classifier="head")


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": student_cfg(224)
        for name in ("cit_tiny_patch16_224", "cit_small_patch16_224", "cit_small_aligned_patch16_224")
    }
)


@register_model
def cit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Student:
    """The paper's CiT-Ti without token alignment, about 6 M parameters."""
    return create_student("cit_tiny_patch16_224", pretrained, **{"embed_dim": 192, "num_heads": 3, **kwargs})


@register_model
def cit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Student:
    """The paper's CiT-S without token alignment, about 22 M parameters."""
    return create_student("cit_small_patch16_224", pretrained, **{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def cit_small_aligned_patch16_224(pretrained: bool = False, **kwargs: Any) -> Student:
    """The paper's CiT-SAK: CiT-S with aligned tokens, about 26 M parameters."""
    size = {"embed_dim": 384, "num_heads": 6, "aligned": PAPER_ALIGNMENT}
    return create_student("cit_small_aligned_patch16_224", pretrained, **{**size, **kwargs})
