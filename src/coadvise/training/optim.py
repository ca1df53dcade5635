"""AdamW with timm's parameter groups, averaged weights, and the learning rate of a step."""

import math

import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

from coadvise.config import RecipeConfig


def make_optimiser(model: nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """AdamW, fused; no weight decay on biases, norms and what the model exempts (tokens, position embedding)."""
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=exempt)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def average_of(network: nn.Module, recipe: RecipeConfig) -> ModelEmaV3 | None:
    """The moving average of a network's weights, on its device; None where the recipe has none."""
    return ModelEmaV3(network, decay=recipe.ema, use_warmup=True, foreach=True) if recipe.ema else None


def learning_rate(step: int, steps_per_epoch: int, recipe: RecipeConfig) -> float:
    """Linear warm-up, then a cosine to the floor; a pure function of the step (counted from 0)."""
    total = recipe.epochs * steps_per_epoch
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    floor = min(recipe.min_learning_rate, recipe.learning_rate)
    return floor + (recipe.learning_rate - floor) * (1 + math.cos(math.pi * done)) / 2
