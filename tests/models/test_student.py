"""What a student adds to timm's vision transformer: named tokens, their heads and their alignment."""

from itertools import combinations
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from coadvise.models import AlignedPatchEmbed, Student

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}
BOTH = {"conv": "conv", "inv": "inv"}


def student(**arguments: Any) -> Student:
    torch.manual_seed(0)
    return Student(**{**TINY, **arguments})


def images(size: int | tuple[int, int] = 32) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_no_tokens_is_timms_vision_transformer() -> None:
    net = student(token_names=()).eval()
    plain = timm.models.VisionTransformer(**TINY).eval()
    plain.load_state_dict(net.state_dict(), strict=True)
    torch.testing.assert_close(net(images()), plain(images()))


@pytest.mark.parametrize("names", [names for k in range(4) for names in combinations(("a", "b", "c"), k)])
def test_any_set_of_tokens_is_aligned(names: tuple[str, ...]) -> None:
    kinds = {"a": "conv", "b": "inv", "c": "conv"}
    net = student(token_names=("a", "b", "c"), aligned={name: kinds[name] for name in names})
    sum(logits.sum() for logits in net.forward_tokens(images()).values()).backward()
    assert all(p.grad is not None for p in net.parameters())  # no parameter without a use
    assert (0 if net.reg_token is None else net.reg_token.shape[1]) == 3 - len(names)
    assert list(net.forward_tokens(images())) == ["class", "a", "b", "c"]


SHAPES = [(4, 32, None), (16, 64, None), (3, 33, None), (16, 64, (4, 2)), (12, 48, (3, 2)), (16, 64, (2, 2))]


@pytest.mark.parametrize(("patch", "size", "strides"), SHAPES)
def test_aligned_tokens_are_means_and_patches_the_sum(patch: int, size: int, strides: tuple[int, int] | None) -> None:
    embed = AlignedPatchEmbed(size, patch, 3, 24, aligned=BOTH, stem_strides=strides).eval()
    patches, tokens = embed(images(size))
    maps = {name: stem(images(size)) for name, stem in embed.stems.items()}
    assert patches.shape == (2, embed.num_patches, 24)
    assert embed.num_patches == (size // patch) ** 2
    torch.testing.assert_close(patches, (maps["conv"] + maps["inv"]).flatten(2).mT)
    for name, token in tokens.items():
        torch.testing.assert_close(token, maps[name].flatten(2).mean(-1)[:, None])


@pytest.mark.parametrize(("patch", "size", "strides"), SHAPES)
def test_a_stem_sees_every_pixel(patch: int, size: int, strides: tuple[int, int] | None) -> None:
    for stem in AlignedPatchEmbed(size, patch, 3, 24, aligned=BOTH, stem_strides=strides).stems.values():
        x = images(size).requires_grad_()
        stem(x).square().sum().backward()
        assert x.grad is not None
        assert (x.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("aligned", [None, BOTH, {"conv": "conv"}])
def test_other_sizes(aligned: dict[str, str] | None) -> None:
    fixed = student(aligned=aligned).eval()
    with pytest.raises((ValueError, AssertionError), match="40"):
        fixed(images(40))
    dynamic = student(aligned=aligned, dynamic_img_size=True).eval()
    dynamic.load_state_dict(fixed.state_dict(), strict=True)
    torch.testing.assert_close(dynamic(images()), fixed(images()))
    assert dynamic(images((40, 24))).shape == (2, 5)
    _, features = dynamic.forward_intermediates(images((40, 24)))
    assert features[-1].shape == (2, 24, 10, 6)
    with pytest.raises((ValueError, AssertionError)):
        dynamic(images(30))
    padded = student(aligned=aligned, dynamic_img_size=True, dynamic_img_pad=True).eval()
    assert padded(images(30)).shape == (2, 5)


def test_images_are_padded_at_the_right_and_the_bottom() -> None:
    embed = AlignedPatchEmbed(32, 4, 3, 24, aligned=BOTH, strict_img_size=False, dynamic_img_pad=True)
    x = images((30, 17))
    padded = embed.checked(x)
    assert padded.shape == (2, 3, 32, 20)
    assert torch.equal(padded[..., :30, :17], x)
    assert padded.count_nonzero() == x.count_nonzero()
    assert embed.dynamic_feat_size((30, 17)) == (8, 5)


def test_aligned_stems_say_why_another_patch_size_is_impossible() -> None:
    with pytest.raises(ValueError, match="create the model with"):
        student(aligned=BOTH).set_input_size(patch_size=(8, 8))
    with pytest.raises(ValueError, match="whole number of patches"):
        student(aligned=BOTH, img_size=30)
    with pytest.raises(ValueError, match="square"):
        student(aligned=BOTH, patch_size=(4, 8))
    for strides in ((3, 1), (4, 2), (2, 0), (2,)):
        with pytest.raises(ValueError, match=r"stem_strides .* whose product divides the patch of 4"):
            student(aligned=BOTH, patch_size=4, stem_strides=strides)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"token_names": ("conv", "conv")}, "conv"),
        ({"token_names": ("drop",)}, "not allowed"),
        ({"token_names": ("conv",), "aligned": {"inv": "inv"}}, "not among the tokens"),
        ({"aligned": {"conv": "fourier"}}, r"\['conv', 'inv'\]"),
        ({"global_pool": "avg"}, "read their own tokens"),
    ],
)
def test_faults_say_what_is_allowed(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        student(**arguments)


def test_tokens_start_apart() -> None:
    net = student()
    assert net.cls_token.std() > 0.01
    assert net.reg_token.std(dim=1).min() > 0


def test_heads_start_alike_fresh_or_replaced() -> None:
    net = student(embed_dim=192, num_classes=20)
    for _ in range(2):
        for head in net.heads().values():
            assert head.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not head.bias.any()
        net.reset_classifier(30)
