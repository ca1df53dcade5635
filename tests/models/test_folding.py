"""Folded networks compute what they did, whatever the network; what cannot be folded stays."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import coadvise.models  # noqa: F401
from coadvise.models.folding import fold_batch_norms, sample_images


def settled(network: nn.Module) -> nn.Module:
    """Batch norms of a trained network's kind: every figure its own, none the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.2, generator=generator)
                nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def assert_equal_answers(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        wanted = other(x)
        torch.testing.assert_close(one(x), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("name", "size", "left"),
    [
        ("resnet_small", 32, 0),
        ("rednet_small", 32, 6),  # those behind its six involutions
        ("cit_micro_aligned_patch4_32", 32, 1),
        ("cit_micro_patch4_32", 32, 0),
        ("resnet18", 64, 0),
        ("resnet26d", 64, 0),
        ("regnety_004", 64, 0),  # ConvNormAct: norm and activation in one module
        ("tf_efficientnet_b0", 64, 0),  # convolutions that pad by themselves
        ("repvgg_a0", 64, 17),  # batch norms of shortcuts, with no layer before them
        ("resnetv2_50", 64, 17),  # norm before convolution
    ],
)
def test_any_network_answers_the_same(name: str, size: int, left: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = settled(timm.create_model(name, num_classes=7))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    folded = fold_batch_norms(network, sample_images(3, size))
    assert torch.equal(torch.get_rng_state(), state)
    assert norms(folded) == left
    assert not folded.training
    assert not any(p.requires_grad for p in folded.parameters())
    assert_equal_answers(folded, network, torch.randn(3, 3, size, size))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@given(
    channels=st.sampled_from([2, 4]),
    kernel=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_one_pair(channels: int, kernel: int, groups: int, bias: bool, affine: bool, dtype: torch.dtype) -> None:
    conv = nn.Conv2d(channels, 6, kernel, padding=kernel // 2, groups=groups, bias=bias)
    network = settled(nn.Sequential(conv, nn.BatchNorm2d(6, affine=affine), nn.ReLU())).to(dtype)
    x = torch.randn(2, channels, 5, 5, dtype=dtype)
    folded = fold_batch_norms(network, x)
    assert norms(folded) == 0
    assert folded[0].weight.dtype == dtype
    assert_equal_answers(folded, network, x)


def test_under_autocast_it_is_the_same_as_without() -> None:
    net, sample = settled(nn.Sequential(nn.Conv2d(3, 64, 7), nn.BatchNorm2d(64), nn.ReLU())), sample_images(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        folded = fold_batch_norms(net, sample)
    assert norms(folded) == 0
    assert torch.equal(folded[0].weight, fold_batch_norms(net, sample)[0].weight)


def test_linear_layers_fold_too() -> None:
    network = settled(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    folded = fold_batch_norms(network, torch.rand(3, 5))
    assert norms(folded) == 0
    assert_equal_answers(folded, network, torch.randn(3, 5))


class Wired(nn.Module):
    """A convolution and a batch norm, put together in a way that a fold must see through."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.wiring = wiring
        conv = timm.layers.ScaledStdConv2d if wiring == "standardised" else nn.Conv2d
        self.conv = conv(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, track_running_stats=wiring != "by the batch")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.wiring == "also used elsewhere":
            return self.bn(y) + y
        if self.wiring == "changed in between":
            return self.bn(y.relu_())
        if self.wiring == "convolution twice":
            return self.bn(self.conv(y))
        if self.wiring == "norm twice":
            return self.bn(self.bn(y))
        if self.wiring == "weights read elsewhere":
            return self.bn(y) + self.conv.weight.sum()
        if self.wiring == "norm first":
            return self.conv(self.bn(x))
        return self.bn(y)


@pytest.mark.parametrize(
    "wiring",
    [
        "also used elsewhere",
        "changed in between",
        "convolution twice",
        "norm twice",
        "weights read elsewhere",
        "norm first",
        "standardised",
        "by the batch",
    ],
)
def test_what_would_change_the_answer_is_left(wiring: str) -> None:
    network = settled(Wired(wiring)) if wiring != "by the batch" else Wired(wiring).eval()
    folded = fold_batch_norms(network, sample_images(4, 6))
    assert norms(folded) == 1
    assert_equal_answers(folded, network, torch.randn(2, 4, 6, 6))


def test_a_linear_layer_of_sequences_is_left() -> None:
    network = settled(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(3)))  # [B, 3, 5]: the norm's channels are rows
    folded = fold_batch_norms(network, torch.rand(2, 3, 5))
    assert norms(folded) == 1
    assert_equal_answers(folded, network, torch.randn(2, 3, 5))
