"""The learning rate of a step, and what is not decayed."""

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from coadvise.config.schema import RecipeConfig
from coadvise.training.optim import learning_rate, make_optimiser

recipes = st.builds(
    RecipeConfig,
    epochs=st.integers(1, 20),
    learning_rate=st.floats(1e-5, 1),
    min_learning_rate=st.floats(0, 1),
    warmup_epochs=st.floats(0, 25),
)


@given(recipes, st.integers(1, 9))
def test_learning_rate_climbs_evenly_peaks_and_falls_to_the_floor(recipe: RecipeConfig, per_epoch: int) -> None:
    total = recipe.epochs * per_epoch
    warmup = min(round(recipe.warmup_epochs * per_epoch), total)
    rates = [learning_rate(step, per_epoch, recipe) for step in range(total + 1)]
    peak, floor = recipe.learning_rate, min(recipe.min_learning_rate, recipe.learning_rate)
    assert rates[:warmup] == pytest.approx([peak * (step + 1) / warmup for step in range(warmup)])
    if warmup < total:
        assert rates[warmup] == pytest.approx(peak)
        assert rates[total] == pytest.approx(floor)
        middle = rates[warmup : total + 1]
        assert middle == sorted(middle, reverse=True)
        assert min(middle) >= floor * (1 - 1e-9)
    assert 0 < max(rates) <= peak * (1 + 1e-9)
    assert all(map(math.isfinite, rates))


def test_learning_rate_is_pytorchs_cosine() -> None:
    recipe = RecipeConfig(epochs=10, learning_rate=0.3, min_learning_rate=0.01, warmup_epochs=0)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=50, eta_min=0.01)
    for step in range(50):
        assert learning_rate(step, 5, recipe) == pytest.approx(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()


@pytest.mark.parametrize("name", ["cit_micro_patch4_32", "cit_micro_aligned_patch4_32", "rednet_small", "resnet_small"])
def test_only_matrices_and_kernels_of_our_networks_are_decayed(name: str) -> None:
    model = timm.create_model(name, num_classes=4)
    expected = {
        parameter
        for parameter, value in model.named_parameters()
        if value.ndim > 1 and not parameter.endswith(("cls_token", "reg_token", "pos_embed", ".bias"))
    }
    optimiser = make_optimiser(model, RecipeConfig(weight_decay=0.1, learning_rate=0.02, betas=(0.8, 0.9)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimiser.param_groups
    assert sorted(names) == sorted(id(p) for group in groups for p in group["params"]), "each of them once"
    assert {(group["lr"], group["betas"]) for group in groups} == {(0.02, (0.8, 0.9))}
    assert {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]} == expected
    assert not any("lr_scale" in group for group in groups)
    layered = make_optimiser(model, RecipeConfig(weight_decay=0.1, layer_decay=0.5)).param_groups
    assert {names[id(p)] for group in layered if group["weight_decay"] for p in group["params"]} == expected
    scales = {names[id(p)]: group["lr_scale"] for group in layered for p in group["params"]}
    assert sorted(scales) == sorted(names.values())
    assert {scales[name] for name in scales if name.startswith(("head", "fc"))} == {1.0}
    assert min(scales.values()) < 0.5
