"""Any vision transformer of timm as a student: its own model, built by timm, with a token and a head for each teacher.

The named tokens come after timm's prefix (class token, registers) and before the patches. Everything else (blocks,
layer scale, norms, activation) is timm's, so published weights fit. `Student` is the paper's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.layers.weight_init import trunc_normal_
from timm.models import model_entrypoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.errors import UserError
from coadvise.models import STUDENTS
from coadvise.models.student import aligned_embed
from coadvise.models.tokens import TokenModel, check_token_names

WHICH = "timm's vision transformers with a class token (vit_*, deit_*, deit3_*, DINOv2)"
STUDENTS_ARE = f"students are {', '.join(STUDENTS)}, and {WHICH}"


class TokenViT(TokenModel, nn.Module):
    """timm's vision transformer over the sequence [class, registers, named tokens, patches].

    A named token is one vector, which holds its position too. An aligned token adds the mean of its stem.

    Args:
        vit: timm's model, with a class token that its head reads.
        token_names: One name a teacher, in the order of the tokens.
        aligned: Token name to kind of stem, for a model whose patch embedding has these stems.

    Raises:
        UserError: Names that are not allowed, or aligned names that are not among them.
    """

    def __init__(
        self, vit: VisionTransformer, token_names: Sequence[str], aligned: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.token_names, self.aligned = check_token_names(token_names), dict(aligned or {})
        if stray := [name for name in self.aligned if name not in self.token_names]:
            raise UserError(f"aligned names {stray} are not among the tokens {list(self.token_names)}")
        self.vit = vit
        self.pretrained_cfg: dict[str, Any] = vit.pretrained_cfg
        self.rows = {name: self.token_names.index(name) for name in self.aligned}
        self.tokens = nn.Parameter(torch.zeros(1, len(self.token_names), vit.embed_dim)) if self.token_names else None
        if self.tokens is not None:
            trunc_normal_(self.tokens, std=0.02)
        for name in self.token_names:
            head = nn.Linear(vit.embed_dim, vit.num_classes)
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.add_module(f"head_{name}", head)

    @property
    def class_token(self) -> Tensor:
        """The class token's vector with its position, [1, 1, D]."""
        vit = self.vit
        own = vit.pos_embed is None or vit.no_embed_class
        return vit.cls_token.detach() if own else (vit.cls_token + vit.pos_embed[:, :1]).detach()

    def start_tokens(self, names: Sequence[str]) -> None:
        """Give these tokens the class token's vector."""
        for row, name in enumerate(self.token_names):
            if name in names and self.tokens is not None:
                self.tokens.data[:, row] = self.class_token[:, 0]

    def heads(self) -> dict[str, nn.Module]:
        """Return every token's head by name, the class token's first."""
        return {CLASS: self.vit.head} | {name: self.get_submodule(f"head_{name}") for name in self.token_names}

    def new_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the heads, the named tokens and their stems."""
        stems = self.vit.patch_embed.parameters() if self.aligned else ()
        return [*super().new_parameters(), *([] if self.tokens is None else [self.tokens]), *stems]

    def no_weight_decay(self) -> set[str]:
        """Return the names of weights that no decay applies to, beyond norms and biases: tokens and positions."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()} | {"tokens"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's layers for layer decay. Named tokens and their stems are with the heads, at the full rate."""
        stem = r"^vit\.(?:cls_token|reg_token|pos_embed|norm_pre|patch_embed\.(?!stems))"
        return {"stem": stem, "blocks": [(r"^vit\.blocks\.(\d+)", None), (r"^vit\.norm", (99999,))]}

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map images [B, C, H, W] to the sequence [B, P + T + N, D] after the last norm; P is timm's prefix.

        Args:
            attn_mask: Added to the attention's scores, as in timm.
        """
        vit = self.vit
        embedded = vit.patch_embed(x)
        patches, means = embedded if isinstance(embedded, tuple) else (embedded, {})
        x = vit.patch_drop(vit._pos_embed(patches))
        if self.tokens is not None:
            rows = list(self.tokens.expand(x.shape[0], -1, -1).split(1, dim=1))
            for name, row in self.rows.items():
                rows[row] = rows[row] + means[name]
            prefix = vit.num_prefix_tokens
            x = torch.cat([x[:, :prefix], vit.pos_drop(torch.cat(rows, dim=1)), x[:, prefix:]], dim=1)
        x = vit.norm_pre(x)
        if attn_mask is None:
            x = vit.blocks(x)
        else:
            for block in vit.blocks:
                x = block(x, attn_mask=attn_mask)
        return vit.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the sequence to the class token's logits [B, num_classes], or to its features [B, D]."""
        return self.vit.forward_head(x, pre_logits)

    def get_classifier(self) -> nn.Module:
        """Return the class token's head."""
        return self.vit.head

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_tokens(self, x: Tensor) -> dict[str, Tensor]:
        """Map images [B, C, H, W] to logits [B, num_classes] by token: ``"class"``, then ``token_names`` in order."""
        vit, x = self.vit, self.forward_features(x)
        named = x[:, vit.num_prefix_tokens : vit.num_prefix_tokens + len(self.token_names)].unbind(1)
        answers = {CLASS: vit.forward_head(x)}
        for name, features in zip(self.token_names, named, strict=True):
            answers[name] = self.get_submodule(f"head_{name}")(vit.head_drop(vit.fc_norm(features)))
        return answers

    def as_timm(self) -> VisionTransformer:
        """Return timm's own model that gives the class token's logits: named tokens are registers, without their heads.

        Raises:
            UserError: Aligned tokens, which come from stems that timm does not have.
        """
        if self.aligned:
            raise UserError("timm has no aligned stems; only students without them, and the paper's, are timm models")
        vit, tokens = copy.deepcopy(self.vit), self.tokens
        if tokens is None:
            return vit
        registers = [] if vit.reg_token is None else [vit.reg_token.data]
        vit.reg_token = nn.Parameter(torch.cat([*registers, tokens.data], dim=1))
        if vit.pos_embed is not None and not vit.no_embed_class:  # the position of a named token is in its vector
            before, patches = vit.pos_embed.data.tensor_split([vit.num_prefix_tokens], dim=1)
            vit.pos_embed = nn.Parameter(torch.cat([before, torch.zeros_like(tokens.data), patches], dim=1))
        vit.num_reg_tokens = vit.reg_token.shape[1]
        vit.num_prefix_tokens += tokens.shape[1]
        return vit

    def for_inference(self) -> nn.Module:
        """Return a frozen copy without the named tokens' heads, which maps images to the class token's logits."""
        model = copy.deepcopy(self).eval().requires_grad_(False)
        for name in model.token_names:
            delattr(model, f"head_{name}")
        model.token_names = ()
        return model


def is_timms(model: str) -> bool:
    """Whether a registered name is of timm itself; other models bring their own tokens, if any."""
    return model_entrypoint(model).__module__.partition(".")[0] == "timm"


def create_token_vit(
    model: str, token_names: Sequence[str], aligned: Mapping[str, str] | None = None, **arguments: Any
) -> TokenViT:
    """Build a vision transformer by its timm name, randomly initialised, with named tokens.

    Args:
        aligned: Token name to kind of stem (``"conv"`` or ``"inv"``); the stems take the place of the patch embedding.
        arguments: For timm's model.

    Raises:
        UserError: Another kind of model.
    """
    stems = {"embed_layer": partial(aligned_embed, aligned=dict(aligned))} if aligned else {}
    vit = timm.create_model(model, **arguments, **stems)
    if type(vit) is not VisionTransformer or vit.cls_token is None or vit.global_pool != "token":
        why = "has no class token for its head" if type(vit) is VisionTransformer else f"is a {type(vit).__name__}"
        raise UserError(f"model '{model}' cannot be a student: it {why}; {STUDENTS_ARE}")
    return TokenViT(vit, token_names, aligned)
