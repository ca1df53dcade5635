"""Students without a sequence: every token reads the same features through a head of its own."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from coadvise.models import OTHER_BIAS, TokenModel

TINY: dict[str, dict[str, Any]] = {
    "resnet10_coadvised": {"widths": (8, 16, 24, 32), "stem_stride": 1},
    "mixer_tiny_coadvised": {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24},
}


@pytest.fixture(params=OTHER_BIAS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def student(name: str, **arguments: Any) -> TokenModel:
    torch.manual_seed(0)
    net = timm.create_model(name, **{"num_classes": 5, **TINY[name], **arguments}).eval()
    for head in net.heads().values():
        if isinstance(head, nn.Linear):
            nn.init.normal_(head.weight)  # a mixer's start at zero
    return net


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_without_tokens_it_is_the_plain_network(name: str) -> None:
    one, separate = student(name, token_names=()), student(name)
    one.train_heads(["class"])
    assert all(parameter.requires_grad for parameter in one.parameters())
    extra = separate.state_dict().keys() - one.state_dict().keys()
    assert extra == {f"head_{token}.{part}" for token in ("conv", "inv") for part in ("weight", "bias")}
    one.load_state_dict({key: value for key, value in separate.state_dict().items() if key not in extra})
    torch.testing.assert_close(one(images()), separate(images()))


def test_a_checkpoint_with_other_classes_keeps_all_but_the_heads(name: str) -> None:
    first = student(name)
    overlay = {"state_dict": first.state_dict(), "num_classes": 5}
    arguments = {**TINY[name], "num_classes": 7}
    second = timm.create_model(name, **arguments, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(second.forward_features(images()), first.forward_features(images()))
    assert second.forward_tokens(images())["inv"].shape == (2, 7)


def test_for_inference_it_is_a_frozen_copy_with_the_class_answer(name: str) -> None:
    net = student(name)
    made = net.for_inference()
    assert torch.equal(made(images()), net(images()))
    assert not made.training
    assert not any(p.requires_grad for p in made.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not any("head_conv" in key for key in made.state_dict())
    assert list(net.forward_tokens(images())) == ["class", "conv", "inv"]


def test_a_mixer_pools_by_the_mean_only() -> None:
    with pytest.raises(ValueError, match="'avg'"):
        student("mixer_tiny_coadvised", global_pool="max")


def test_the_paper_s_sizes() -> None:
    with torch.device("meta"):
        resnet, mixer = (timm.create_model(name, token_names=()) for name in OTHER_BIAS)
    assert [len(stage) for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)] == [1, 1, 1, 1]
    assert sum(p.numel() for p in resnet.parameters()) == 5_418_792  # He et al.'s blocks, (1, 1, 1, 1), 1000 classes
    assert (len(mixer.blocks), mixer.embed_dim) == (12, 192)
