"""timm's model contract, for every registered network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.drop import DropPath
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from coadvise.models import MODELS, OTHER_BIAS, REDNETS, RESNETS, TRANSFORMERS

# Each at a size that a test can pay for; the class behind it is the registered one.
CHEAP: dict[str, dict[str, Any]] = {
    **{name: {"depths": (1, 1, 1, 1), "widths": (64, 128, 128, 192), "stem_width": 32} for name in REDNETS[:-1]},
    **{name: {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3} for name in TRANSFORMERS},
    "rednet_small": {"depths": (1, 1, 1), "widths": (64, 64, 128), "kernel_size": 3},
    "resnet_small": {"widths": (8, 16, 24)},
    "resnet10_coadvised": {"widths": (8, 16, 24, 32), "stem_stride": 1},
    "mixer_tiny_coadvised": {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24},
}
SIZE = 32
PATCHES = (*TRANSFORMERS, "mixer_tiny_coadvised")  # built for one image size


def create(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(name, **{**CHEAP[name], **arguments})
    for module in net.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # a mixer's heads: they would hide what is before
            nn.init.normal_(module.weight)
    return net


def images(channels: int = 3, size: int = SIZE) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("channels", "classes"), [(1, 5), (4, 7)])
def test_channels_and_classes(name: str, channels: int, classes: int) -> None:
    net = create(name, in_chans=channels, num_classes=classes).eval()
    assert net(images(channels)).shape == (2, classes)
    assert (net.num_classes, net.in_chans) == (classes, channels)


@pytest.mark.parametrize("size", [(48, 32), (33, 47)])
def test_image_sizes(name: str, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    if name not in PATCHES:
        assert create(name, num_classes=5).eval()(x).shape == (2, 5)
    elif size[0] % 16 == 0:
        assert create(name, num_classes=5, img_size=size).eval()(x).shape == (2, 5)
    else:
        with pytest.raises((ValueError, AssertionError), match=r"\d+.*\d+"):  # names the sizes
            create(name, num_classes=5, img_size=32).eval()(x)


def test_no_classes_gives_pooled_features_and_no_pool_gives_the_map(name: str) -> None:
    net = create(name, num_classes=0).eval()
    assert isinstance(net.get_classifier(), nn.Identity)
    assert net(images()).shape == (2, net.num_features) == (2, net.head_hidden_size)
    unpooled = create(name, num_classes=0, global_pool="").eval()
    torch.testing.assert_close(unpooled(images()), unpooled.forward_features(images()))
    with pytest.raises(ValueError, match="num_classes=0"):
        create(name, num_classes=5, global_pool="")


def test_reset_classifier(name: str) -> None:
    net = create(name, num_classes=5).eval().double()
    net.reset_classifier(3)
    assert net(images().double()).shape == (2, 3)
    assert not net.get_classifier().training
    net.reset_classifier(0, "")
    torch.testing.assert_close(net(images().double()), net.forward_features(images().double()))
    net.reset_classifier(4, "token" if name in TRANSFORMERS else "avg")
    assert net(images().double()).shape == (2, 4)


def test_pretrained_cfg_names_exist(name: str) -> None:
    net = create(name, num_classes=5)
    cfg = net.pretrained_cfg
    assert cfg["url"] == ""
    assert cfg == net.default_cfg
    keys = net.state_dict()
    for part in ("first_conv", "classifier"):
        names = cfg[part] if isinstance(cfg[part], (tuple, list)) else (cfg[part],)
        assert all(f"{key}.weight" in keys for key in names)


def test_intermediates(name: str) -> None:
    net = create(name, num_classes=5).eval()
    last, features = net.forward_intermediates(images())
    torch.testing.assert_close(last, net.forward_features(images()))
    assert len(features) == len(net.feature_info)
    for feature, info in zip(features, net.feature_info, strict=True):
        assert feature.shape == (2, info["num_chs"], SIZE // info["reduction"], SIZE // info["reduction"])
    (one,) = net.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(one, features[1])


def test_features_only(name: str) -> None:
    extra = {"out_indices": [0, 1]} if name in PATCHES else {}
    net = create(name, features_only=True, **extra).eval()
    features = net(images())
    assert [f.shape[1] for f in features] == net.feature_info.channels()
    assert [SIZE // f.shape[-1] for f in features] == net.feature_info.reduction()


def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    net = create(name, num_classes=5).train()
    gradients = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        net(images()).square().sum().backward()
        gradients.append({key: p.grad for key, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_parameter_groups(name: str) -> None:
    net = create(name, num_classes=5)
    count = len(list(net.parameters()))
    assert sum(len(group["params"]) for group in param_groups_layer_decay(net)) == count
    groups = param_groups_weight_decay(net, 0.05, no_weight_decay_list=net.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed
    assert not any(
        id(p) in decayed
        for key, p in net.named_parameters()
        if p.ndim < 2 or key in ("pos_embed", "cls_token", "reg_token")
    )


@pytest.mark.parametrize("name", ["cit_micro_patch4_32", *OTHER_BIAS])
@pytest.mark.parametrize("tokens", [(), ("b", "a", "vit_l"), ["conv", "inv"]])
@pytest.mark.parametrize("training", [False, True])
def test_any_tokens_in_their_order_training_or_not(name: str, tokens: Sequence[str], training: bool) -> None:
    net = create(name, num_classes=5, token_names=tokens).train(training)
    answers = net.forward_tokens(images())
    assert list(answers) == list(net.heads()) == ["class", *tokens]
    assert all(logits.shape == (2, 5) for logits in answers.values())
    torch.testing.assert_close(net(images()), answers["class"])


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHER_BIAS])
def test_each_teacher_has_a_head_of_its_own(name: str) -> None:
    net = create(name, num_classes=5).eval()
    before = net.forward_tokens(images())
    with torch.no_grad():
        net.heads()["conv"].weight.add_(1.0)
    after = net.forward_tokens(images())
    assert [token for token in before if not torch.equal(before[token], after[token])] == ["conv"]
    net.train_heads(["class"])
    frozen = [token for token, head in net.heads().items() if not any(p.requires_grad for p in head.parameters())]
    assert frozen == ["conv", "inv"]


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHER_BIAS])
def test_the_heads_of_all_tokens_are_reset(name: str) -> None:
    net = create(name, num_classes=5)
    net.reset_classifier(3)
    answers = net.forward_tokens(images())
    assert {token: logits.shape for token, logits in answers.items()} == dict.fromkeys(("class", "conv", "inv"), (2, 3))
    net.reset_classifier(0)
    assert all(isinstance(head, nn.Identity) for head in net.heads().values())


@pytest.mark.parametrize("rate", ["drop_rate", "drop_path_rate"])
def test_drop_rates_act_in_training_only(name: str, rate: str) -> None:
    started = {"zero_init_last": False} if name in REDNETS else {}  # blocks that start as their shortcuts hide it
    net = create(name, num_classes=5, **{rate: 0.5}, **started)
    x = images(size=SIZE)
    net.eval()
    torch.testing.assert_close(net(x), net(x))
    net.train()
    assert any(not torch.equal(net(x), net(x)) for _ in range(8))  # two images may have the same luck
    assert net(x).shape == (2, 5)


@pytest.mark.parametrize("name", ["rednet_small", "resnet_small"])
def test_stages_start_as_published(name: str) -> None:
    """Convolutions by He's rule (fan out); blocks as their shortcuts where asked, and left out ever more often."""
    net = create(name, **{"depths": (2, 2, 1), "zero_init_last": True, "drop_path_rate": 0.4}).eval()
    assert [m.drop_prob for m in net.modules() if isinstance(m, DropPath)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    for conv in (module for module in net.modules() if isinstance(module, nn.Conv2d)):
        given = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.numel() < 500 or conv.weight.std().item() == pytest.approx((2 / given) ** 0.5, rel=0.15)
        assert conv.bias is None or not conv.bias.any()
    usual = create(name, **{"depths": (2, 2, 1), "zero_init_last": False}).eval()
    x = net.maxpool(net.stem(images()))
    for block, other in zip(net.layer1, usual.layer1, strict=True):
        shortcut = x if block.downsample is None else block.downsample(x)
        torch.testing.assert_close(block(x), shortcut.relu())
        *before, last = (module.weight for module in block.children() if isinstance(module, nn.BatchNorm2d))
        assert all(weight.all() for weight in before)  # or what is behind them would never get a gradient
        assert not last.any()
        assert not torch.allclose(other(x), shortcut.relu())
        x = block(x)


def test_runs_under_autocast(name: str) -> None:
    net = create(name, num_classes=5).eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = net(images())
    torch.testing.assert_close(low.float(), net(images()), rtol=0.1, atol=0.1)


def test_exports(name: str) -> None:
    net = create(name, num_classes=5).eval()
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = images()[:1].repeat(3, 1, 1, 1)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cit_micro_aligned_patch4_32", "rednet_small", *RESNETS, "mixer_tiny_coadvised"])
def test_compiles_without_a_break(name: str) -> None:
    """One network of each class. To make kernels of a graph is PyTorch's affair; its capture is what we can spoil."""
    net = create(name, num_classes=5).train()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    gradients = []
    for model in (net, compiled):
        net.zero_grad()
        model(images()).square().sum().backward()
        gradients.append({key: p.grad for key, p in net.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def test_position_embedding_follows_the_image_size(tmp_path: Path) -> None:
    """Weights for 32 pixels, loaded at 96, are those of the first network made to take 96."""
    name = "cit_small_aligned_patch16_224"
    first = create(name, num_classes=5).eval()
    save_file(first.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 5}
    second = create(name, num_classes=5, img_size=96, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(second.pos_embed[:, :3], first.pos_embed[:, :3])
    dynamic = create(name, num_classes=5, dynamic_img_size=True).eval()
    dynamic.load_state_dict(first.state_dict())
    first.set_input_size(96)
    x = images(size=96)
    torch.testing.assert_close(second(x), first(x))
    torch.testing.assert_close(second(x), dynamic(x))


def test_impossible_widths_say_what_is_possible() -> None:
    with pytest.raises(ValueError, match="multiples of 64"):
        create("rednet_small", widths=(64, 96, 128))
    with pytest.raises(ValueError, match="multiple of 32"):
        create("rednet_small", stem_width=48)
    with pytest.raises(ValueError, match="one entry a stage"):
        create("resnet_small", depths=(1, 1))
    with pytest.raises(ValueError, match="odd"):
        create("rednet_small", kernel_size=4)
