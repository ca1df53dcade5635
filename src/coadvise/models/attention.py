"""Where the tokens of a vision transformer look: how much each attends to each patch."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.errors import UserError
from coadvise.models.network import Network
from coadvise.models.student import Student
from coadvise.models.token_vit import TokenViT

AT_ONCE = 25  # images whose attention [B, N, N] of every block is held
Maps = Mapping[str, Tensor]  # token -> [B, H', W'] over the patches, each map sums to 1


@dataclass(frozen=True)
class AttentionMaps:
    """Where each token looks.

    Attributes:
        last: The last block's attention from the token to the patches, mean over heads.
        rollout: Through all blocks, with the shortcuts (Abnar and Zuidema, ACL 2020).
    """

    last: Maps
    rollout: Maps

    def overlaps(self) -> list[dict[str, Any]]:
        """For each pair of "tokens" the share of their maps that is the same, 0 to 1, mean over images."""
        return [
            {
                "tokens": [one, other],
                "last": overlap(self.last[one], self.last[other]).mean().item(),
                "rollout": overlap(self.rollout[one], self.rollout[other]).mean().item(),
            }
            for one, other in combinations(self.last, 2)
        ]


@torch.no_grad()
def attention_maps(network: Network, images: Tensor) -> AttentionMaps:
    """Where the tokens of a student look in some images; its mode is restored.

    Args:
        network: A student, or another of timm's vision transformers with a class token.
        images: [B, 3, H, W] in 0..1.

    Raises:
        UserError: A network without attention from tokens to patches.
    """
    model = network.model
    body, rows, first = _layout(model)
    grid = [side // patch for side, patch in zip(images.shape[-2:], body.patch_embed.patch_size, strict=True)]
    last, rollout = list[Tensor](), list[Tensor]()
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        weights: list[Tensor] = []  # of each block [B, N, N], mean over heads; each row sums to 1
        for block in body.blocks:
            stack.callback(setattr, block.attn, "fused_attn", block.attn.fused_attn)
            block.attn.fused_attn = False  # the fused one never has the weights
            stack.callback(block.attn.attn_drop.register_forward_hook(_keeper(weights)).remove)
        for some in images.split(AT_ONCE):
            weights.clear()
            model.forward_features(network.normalised(some))  # type: ignore[operator]
            joint = own = torch.eye(weights[0].shape[-1], device=weights[0].device)
            for layer in weights:
                joint = (layer + own) / 2 @ joint
            last.append(weights[-1][:, list(rows.values()), first:])
            rollout.append(joint[:, list(rows.values()), first:])

    def maps(found: list[Tensor]) -> dict[str, Tensor]:
        shares = torch.cat(found)  # [B, tokens, patches]
        shares = (shares / shares.sum(-1, keepdim=True)).unflatten(-1, grid)
        return dict(zip(rows, shares.unbind(1), strict=True))

    return AttentionMaps(maps(last), maps(rollout))


def _layout(model: nn.Module) -> tuple[Any, dict[str, int], int]:
    """The transformer, the row of each token in its sequence, and that of the first patch."""
    body: Any = model
    names: tuple[str, ...] = ()
    before = 1
    if isinstance(model, TokenViT):
        body, names, before = model.vit, model.token_names, model.vit.num_prefix_tokens
    elif isinstance(model, Student):
        names = model.token_names
    elif isinstance(model, VisionTransformer):
        before = model.num_prefix_tokens
    if not isinstance(body, VisionTransformer) or body.cls_token is None:
        raise UserError(f"a {type(model).__name__} has no tokens that look at patches; give a vision transformer")
    if not all(isinstance(block.attn, Attention) for block in body.blocks):
        raise UserError("this transformer's attention is of a kind whose weights cannot be read")
    rows = {CLASS: 0} | {name: before + place for place, name in enumerate(names)}
    return body, rows, before + len(names)


def _keeper(kept: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(module: nn.Module, given: Any, weights: Tensor) -> None:
        kept.append(weights.float().mean(1))

    return keep


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """The share of two maps [B, H', W'] that is the same, [B]."""
    return torch.minimum(one, other).sum((-2, -1))
