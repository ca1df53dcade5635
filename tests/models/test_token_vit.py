"""timm's vision transformers as students: timm's own features, and named tokens beside them."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from coadvise.config.schema import ModelConfig
from coadvise.errors import UserError
from coadvise.models.network import Network, build_network, load_network
from coadvise.models.token_vit import TokenViT, create_token_vit

FAMILIES = {  # plain; position embedding with the class token; without it, layer scale; registers and layer scale
    "vit": "vit_tiny_patch16_224",
    "deit": "deit_tiny_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "dinov2": "vit_small_patch14_reg4_dinov2",
}
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
TOKENS = ("conv", "inv")


def student(model: str = FAMILIES["vit"], **arguments: Any) -> TokenViT:
    """With random values for what timm starts at 0 or 1, such as layer scale."""
    torch.manual_seed(0)
    net = create_token_vit(model, **{"token_names": TOKENS, **SMALL, **arguments})
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES.keys())
@torch.no_grad()
def test_with_the_new_tokens_masked_the_features_are_timm_s(model: str) -> None:
    net = student(model)
    plain = timm.create_model(model, **SMALL).eval()
    plain.load_state_dict(net.vit.state_dict(), strict=True)
    prefix, new = plain.num_prefix_tokens, len(TOKENS)
    length = prefix + new + plain.patch_embed.num_patches
    mask = torch.zeros(length, length)
    mask[:, prefix : prefix + new] = -torch.inf
    wanted = plain.forward_features(images())
    own = [row for row in range(length) if not prefix <= row < prefix + new]
    torch.testing.assert_close(net.forward_features(images(), mask)[:, own], wanted)
    seen = net.forward_features(images())
    assert seen.shape == (2, length, 48)
    assert not torch.allclose(seen[:, own], wanted, atol=1e-3), "unmasked, they have a say"
    torch.testing.assert_close(net(images()), plain.forward_head(seen[:, own]))
    without = create_token_vit(model, token_names=(), **SMALL).eval()
    without.vit.load_state_dict(plain.state_dict())
    torch.testing.assert_close(without(images()), plain(images()))


@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES.keys())
@torch.no_grad()
def test_each_token_has_its_head_and_inference_keeps_the_class_token_s(model: str) -> None:
    net = student(model)
    answers = net.forward_tokens(images())
    assert list(answers) == list(net.heads()) == ["class", *TOKENS]
    torch.testing.assert_close(answers["class"], net(images()))
    torch.testing.assert_close(net.for_inference()(images()), net(images()))
    prefix = net.vit.num_prefix_tokens
    for row, name in enumerate(TOKENS):
        features = net.forward_features(images())[:, prefix + row]
        torch.testing.assert_close(answers[name], net.heads()[name](features))
    fewer = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.for_inference().parameters())
    assert fewer == len(TOKENS) * (48 * 5 + 5)


def test_every_parameter_is_trained_and_aligned_tokens_are_their_stems_means() -> None:
    net = student(aligned={"inv": "inv"}).train()
    sum(answer.square().sum() for answer in net.forward_tokens(images()).values()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert list(net.vit.patch_embed.stems) == ["inv"]
    net.eval()
    patches, means = net.vit.patch_embed(images())
    torch.testing.assert_close(means["inv"][:, 0], patches.mean(1))
    plain = copy.deepcopy(net)
    plain.rows = {}
    with torch.no_grad():
        changed = torch.stack(
            [a - b for a, b in zip(*(n.forward_features(images()) for n in (net, plain)), strict=True)]
        )
    assert changed.abs().max() > 1e-3, "the mean is part of the token"
    torch.testing.assert_close(net.for_inference()(images()), net(images()))


def test_tokens_start_as_the_class_token_with_its_position() -> None:
    for model, position in ((FAMILIES["vit"], True), (FAMILIES["deit3"], False)):
        net = student(model)
        before = net.tokens.detach().clone()
        net.start_tokens(["inv"])
        wanted = net.vit.cls_token[0, 0] + (net.vit.pos_embed[0, 0] if position else 0)
        torch.testing.assert_close(net.tokens[0, 1], wanted)
        assert torch.equal(net.tokens[0, 0], before[0, 0])


def test_layer_decay_goes_by_blocks_and_what_is_new_has_the_full_rate() -> None:
    net = student(aligned={"conv": "conv"})
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = param_groups_layer_decay(net, 0.05, no_weight_decay_list=net.no_weight_decay(), layer_decay=0.5)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert scales.keys() == set(names.values())
    new = {names[id(parameter)] for parameter in net.new_parameters()}
    assert {"tokens", "head_conv.weight", "vit.head.bias", "vit.patch_embed.stems.conv.proj.weight"} <= new
    for name, scale in scales.items():
        block = {"vit.blocks.0": 0.25, "vit.blocks.1": 0.5}.get(".".join(name.split(".")[:3]))
        assert scale == (1 if name in new else block or (0.5 if name.startswith("vit.norm") else 0.125)), name
    assert not {"tokens", "vit.pos_embed", "vit.cls_token"} & decayed
    assert "vit.blocks.0.attn.qkv.weight" in decayed


def test_a_network_of_it_is_saved_and_read(tmp_path: Any) -> None:
    arguments = {key: value for key, value in SMALL.items() if key not in ("img_size", "num_classes")}
    config = ModelConfig(model="vit_tiny_patch16_224", model_kwargs={**arguments, "aligned": {"conv": "conv"}})
    network = build_network(config, ["a", "b"], 32, 0, TOKENS)
    assert isinstance(network.model, TokenViT)
    assert isinstance(network.model.vit, VisionTransformer)
    assert network.about["mean"] == [0.5, 0.5, 0.5], "timm's, of this model"
    network.save(tmp_path / "kept")
    kept = load_network(tmp_path / "kept")
    assert list(kept(images())) == ["class", *TOKENS]
    torch.testing.assert_close(kept(images())["inv"], network.eval()(images())["inv"])
    assert isinstance(kept.for_inference(), Network)
    program = torch.export.export(kept.for_inference(), (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images())["class"], kept(images())["class"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "size", "said"),
    [
        ("resnet18", 32, "'resnet18' cannot be a student: it is a ResNet; .*timm's vision transformers"),
        ("deit_tiny_distilled_patch16_224", 32, "it is a VisionTransformerDistilled"),
        ("vit_relpos_small_patch16_224", 32, "it is a VisionTransformerRelPos"),
        ("test_vit2", 32, "'test_vit2' cannot be a student: it has no class token for its head"),
        ("vit_small_patch14_dinov2", 32, "patches of 14 pixels, .* data.image_size to 28 or 42"),
        ("vit_tny_patch16_224", 32, "unknown model 'vit_tny_patch16_224', did you mean 'vit_tiny_patch16_224'"),
        ("rednet26", 32, "students are .*and timm's vision transformers"),
    ],
)
def test_what_cannot_be_a_student_is_refused_by_name(model: str, size: int, said: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=said):
        build_network(ModelConfig(model=model), ["a", "b"], size, 0, TOKENS)
    with pytest.raises(UserError, match=r"aligned names \['x'\]"):
        student(aligned={"x": "conv"})
