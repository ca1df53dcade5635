"""AdamW with timm's parameter groups, averaged weights, the learning rate of a step, and gradient clipping."""

import math
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from coadvise.config.schema import RecipeConfig
from coadvise.models import TokenModel


def make_optimiser(model: nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """AdamW, fused; no weight decay on biases, norms and what `model.no_weight_decay` names.

    With layer decay each group has "lr_scale", by which its learning rate is multiplied.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    if recipe.layer_decay < 1:
        groups = param_groups_layer_decay(
            model, recipe.weight_decay, no_weight_decay_list=exempt, layer_decay=recipe.layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=exempt)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def all_but_new(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not trained in the first `head_epochs`: neither heads nor a student's tokens."""
    if isinstance(model, TokenModel):
        new = model.new_parameters()
    else:
        heads: Any = model.get_classifier()  # type: ignore[operator]
        new = [p for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()]
    trained = {id(parameter) for parameter in new}
    return [parameter for parameter in model.parameters() if id(parameter) not in trained]


def average_of(network: nn.Module, recipe: RecipeConfig) -> ModelEmaV3 | None:
    """The moving average of a network's weights, on its device; None if the recipe has none."""
    return ModelEmaV3(network, decay=recipe.ema, use_warmup=True, foreach=True) if recipe.ema else None


def learning_rate(step: int, steps_per_epoch: int, recipe: RecipeConfig) -> float:
    """Linear warm-up, then a cosine to the floor. The step is counted from 0."""
    total = recipe.epochs * steps_per_epoch
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    floor = min(recipe.min_learning_rate, recipe.learning_rate)
    return floor + (recipe.learning_rate - floor) * (1 + math.cos(math.pi * done)) / 2


def clip_gradient(network: nn.Module, largest: float) -> Tensor:
    """The norm of the whole gradient, before it is scaled down to at most `largest`; 0 scales nothing."""
    if largest:
        return torch.nn.utils.clip_grad_norm_(network.parameters(), largest)
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
