"""Students of another bias than the transformer's: ResNet-10 and Mixer-Ti (Co-advise, Table 4).

They have no sequence to put a token into, so a token of theirs is a head of its own on the same pooled features. With
``token_names=()`` there is one output, which labels and all teachers can shape together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.errors import UserError
from coadvise.models.resnet import BasicResNet
from coadvise.models.staged import create_staged, default_cfg
from coadvise.models.tokens import PAPER_TOKENS, TokenModel, check_token_names


class PooledTokens(TokenModel, nn.Module):
    """Tokens for a timm model of pooled features; goes before the model among a class's bases."""

    get_classifier: Callable[[], nn.Module]
    forward_features: Callable[[Tensor], Tensor]
    forward_head: Callable[..., Tensor]

    def _build_token_heads(self) -> None:
        """Give each token a head that starts as the class token's does."""
        for name in self.token_names:
            self.add_module(f"head_{name}", copy.deepcopy(self.get_classifier()))

    def heads(self) -> dict[str, nn.Module]:
        """Return every token's head by name, the class token's first."""
        return {CLASS: self.get_classifier()} | {n: self.get_submodule(f"head_{n}") for n in self.token_names}

    def forward_tokens(self, x: Tensor) -> dict[str, Tensor]:
        """Map images [B, C, H, W] to logits [B, num_classes] by token: ``"class"``, then ``token_names`` in order."""
        pooled = self.forward_head(self.forward_features(x), pre_logits=True)
        return {name: head(pooled) for name, head in self.heads().items()}

    def for_inference(self) -> nn.Module:
        """Return a frozen copy without the tokens, which maps images to the class token's logits."""
        plain = copy.deepcopy(self).eval().requires_grad_(False)
        for name in plain.token_names:
            delattr(plain, f"head_{name}")
        plain.token_names = ()
        return plain


class CoadvisedResNet(PooledTokens, BasicResNet):
    """ResNet-10, a basic block a stage: the student with a convolution's bias.

    Args:
        token_names: One name a head beside the class token's.
        arguments: ``BasicResNet``'s.

    Raises:
        UserError: Token names that are not allowed, or what ``BasicResNet`` refuses.
    """

    def __init__(self, token_names: Sequence[str] = PAPER_TOKENS, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.token_names = check_token_names(token_names)
        self._build_token_heads()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all heads by fresh ones; 0 classes leave them out."""
        super().reset_classifier(num_classes, global_pool)
        self._build_token_heads()


class CoadvisedMixer(PooledTokens, MlpMixer):
    """MLP-Mixer (Tolstikhin et al., 2021): the student that mixes positions by learned weights, without attention.

    Args:
        token_names: One name a head beside the class token's.
        num_classes: Classes of every head; 0 leaves all heads out.
        global_pool: ``"avg"``, or ``""`` for all positions before a head (then ``num_classes`` must be 0).
        arguments: The other arguments of timm's ``MlpMixer``.

    Raises:
        UserError: Token names that are not allowed, or a pooling other than the two.
    """

    global_pool: str

    def __init__(
        self,
        token_names: Sequence[str] = PAPER_TOKENS,
        num_classes: int = 1000,
        global_pool: str = "avg",
        **arguments: Any,
    ) -> None:
        _check_pool(global_pool, num_classes)
        super().__init__(num_classes=num_classes, global_pool=global_pool, **arguments)
        self.in_chans = arguments.get("in_chans", 3)  # timm's own has it from 1.0.25 on
        self.token_names = check_token_names(token_names)
        self._build_token_heads()

    def no_weight_decay(self) -> set[str]:
        """Return the names of weights that no decay applies to, beyond norms and biases: none."""
        return set()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all heads by fresh ones; 0 classes leave them out.

        Raises:
            UserError: A pooling that a mixer does not have.
        """
        _check_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        if not hasattr(self.get_classifier(), "weight"):  # timm before 1.0.29 asks it for its dtype
            weight = next(self.parameters())
            self.head = nn.Linear(1, 1, device=weight.device, dtype=weight.dtype)
        super().reset_classifier(num_classes, global_pool)
        self.get_classifier().train(self.training)
        self._build_token_heads()


def _check_pool(global_pool: str, num_classes: int) -> None:
    if global_pool not in ("avg", "") or (not global_pool and num_classes > 0):
        raise UserError(
            f"global_pool={global_pool!r} with {num_classes} classes: a mixer's heads read the mean of all positions, "
            "so use 'avg', or '' with num_classes=0 for all positions"
        )


def _overlay(own_head: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What timm looks up when a checkpoint has other classes: the names of all heads."""
    names = check_token_names(arguments.get("token_names", PAPER_TOKENS))
    heads = (own_head, *(f"head_{name}" for name in names))
    return {"classifier": heads, **(arguments.pop("pretrained_cfg_overlay", None) or {})}


default_cfgs = generate_default_cfgs(
    {
        "resnet10_coadvised.untrained": default_cfg(224, "stem.conv", pool_size=(7, 7)),
        "mixer_tiny_coadvised.untrained": default_cfg(
            224, "stem.proj", pool_size=None, fixed_input_size=True, classifier="head"
        ),
    }
)

RESNET10: dict[str, Any] = {
    "widths": (64, 128, 256, 512),
    "depths": (1, 1, 1, 1),
    "strides": (1, 2, 2, 2),
    "stem_kernel": 7,
    "stem_stride": 2,
    "stem_pool": True,
}


@register_model
def resnet10_coadvised(pretrained: bool = False, **kwargs: Any) -> CoadvisedResNet:
    """ResNet-10 with a head for each teacher, about 6 M parameters."""
    arguments = {**RESNET10, **kwargs}
    arguments["pretrained_cfg_overlay"] = _overlay("fc", arguments)
    return create_staged(CoadvisedResNet, "resnet10_coadvised", pretrained, len(arguments["depths"]), arguments)


@register_model
def mixer_tiny_coadvised(pretrained: bool = False, **kwargs: Any) -> CoadvisedMixer:
    """Mixer-Ti, 12 layers of width 192, with a head for each teacher, about 5 M parameters."""
    arguments = {"num_blocks": 12, "embed_dim": 192, **kwargs}
    return build_model_with_cfg(
        CoadvisedMixer,
        "mixer_tiny_coadvised",
        pretrained,
        pretrained_cfg_overlay=_overlay("head", arguments),
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **arguments,
    )
