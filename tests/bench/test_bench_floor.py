"""What there is to do is counted, whatever device a network is on."""

import pytest
import timm
import torch
from torch import nn

from coadvise.bench.floor import operations
from coadvise.ops import Involution2d


def test_a_backward_pass_makes_two_gradients_but_for_images() -> None:
    """A convolution's weights, then two linear layers' weights and inputs."""
    first, second, third = 2 * 3 * 8 * 9 * 100, 2 * 800 * 16, 2 * 16 * 4
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(800, 16), nn.ReLU(), nn.Linear(16, 4))
    forward = first + second + third
    assert operations(model, 10) == forward
    assert operations(model, 10, backward=True) == forward + first + 2 * (second + third)
    assert next(model.parameters()).device.type == "cpu"  # it is a copy that was counted
    assert model.training


def test_involution_is_counted() -> None:
    """The kernels' generator, 32 channels to 8 to 2 x 49, and the sum of 49 neighbours for each of 32 channels."""
    network = nn.Sequential(nn.Conv2d(3, 32, 1), Involution2d(32, 7))
    assert operations(network, 8) == 2 * 64 * (3 * 32 + 32 * 8 + 8 * 98 + 32 * 49)


@pytest.mark.parametrize(("name", "giga"), [("deit_small_distilled_patch16_224", 4.6), ("resnet50", 4.1)])
def test_known_networks(name: str, giga: float) -> None:
    """As their papers give them, in multiply-accumulates."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    assert operations(model, 224) / 2e9 == pytest.approx(giga, abs=0.05)
