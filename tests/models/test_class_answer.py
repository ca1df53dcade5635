"""The student for inference answers as the student does, in every way it can be run."""

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coadvise.models import Student, class_answer

BOTH = {"conv": "conv", "inv": "inv"}
TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def student(**arguments: Any) -> Student:
    """A student whose batch norms and biases are not those of an untrained one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Student(**{**TINY, **arguments})
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.2)
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def images(size: int | tuple[int, int] = 32, batch: int = 2, channels: int = 3) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def assert_same_logits(net: Student, x: Tensor) -> None:
    with torch.no_grad():
        wanted = net(x)
        torch.testing.assert_close(net.for_inference()(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [names for k in range(4) for names in combinations(("a", "b", "c"), k)])
@pytest.mark.parametrize("learned", [True, False])
def test_any_set_of_tokens(names: tuple[str, ...], learned: bool) -> None:
    kinds = {"a": "conv", "b": "inv", "c": "conv"}
    aligned = {name: kinds[name] for name in reversed(names)}
    net = student(token_names=("a", "b", "c") if learned else names, aligned=aligned)
    assert_same_logits(net, images())


@given(
    patch=st.sampled_from([2, 3, 4, 8, 16]),
    heads=st.sampled_from([1, 2, 6]),
    depth=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    batch=st.sampled_from([0, 1, 3]),
    aligned=st.booleans(),
)
def test_any_shape(patch: int, heads: int, depth: int, channels: int, batch: int, aligned: bool) -> None:
    shape = {"patch_size": patch, "img_size": 2 * patch, "num_heads": heads, "depth": depth, "in_chans": channels}
    net = student(**shape, aligned=BOTH if aligned else None)
    x = images(2 * patch, batch, channels)
    assert_same_logits(net, x)


@pytest.mark.parametrize("aligned", [None, BOTH, {"inv": "inv"}])
def test_other_image_sizes(aligned: dict[str, str] | None) -> None:
    net = student(aligned=aligned, dynamic_img_size=True)
    for size in (32, (40, 24), (8, 64)):
        assert_same_logits(net, images(size))
    assert_same_logits(student(aligned=aligned, dynamic_img_size=True, dynamic_img_pad=True), images((30, 17)))
    fixed = student(aligned=aligned).for_inference()
    with pytest.raises((ValueError, AssertionError), match="40"):
        fixed(images(40))


@pytest.mark.parametrize("aligned", [None, BOTH])
def test_large_batches_go_through_in_pieces(aligned: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    net = student(aligned=aligned)
    made = net.for_inference()
    seen: list[int] = []
    made.last.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    whole = made(images(batch=7))
    monkeypatch.setattr(class_answer, "CHUNK_VALUES", 3 * (made.prefix.shape[1] + 64) * 96)  # 64 patches, 4 x 24 hidden
    torch.testing.assert_close(made(images(batch=7)), whole)
    assert seen == [7, 3, 3, 1]


@pytest.mark.parametrize("aligned", [None, BOTH])
def test_in_bfloat16_it_is_as_near_as_the_student(aligned: dict[str, str] | None) -> None:
    net = student(aligned=aligned)
    x = images(batch=16)
    with torch.no_grad():
        wanted = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            plain, made = net(x).float(), net.for_inference()(x).float()
    spread = wanted.std()
    assert (made - wanted).square().mean().sqrt() < 0.03 * spread
    assert (made - wanted).square().mean().sqrt() < 2 * (plain - wanted).square().mean().sqrt() + 1e-3 * spread


@pytest.mark.parametrize("aligned", [None, BOTH])
def test_it_compiles_as_one_graph_and_exports(aligned: dict[str, str] | None) -> None:
    net, x = student(aligned=aligned), images()
    made = net.for_inference()
    with torch.no_grad():
        wanted = net(x)
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        exported = torch.export.export(made, (x,), dynamic_shapes=(batch,)).module()
        torch.testing.assert_close(exported(x), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exported(images(batch=5)), net(images(batch=5)), rtol=1e-5, atol=1e-5)


def test_what_the_answer_does_not_need_is_not_there() -> None:
    net = student(aligned=BOTH)
    state = torch.get_rng_state()
    made = net.for_inference()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in made.parameters())
    assert not made.training
    names = [name for name, _ in made.named_modules()]
    assert not any("head_" in name for name in names)
    assert sum(isinstance(module, _BatchNorm) for module in made.modules()) == 1  # behind the involution
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "it shares weights"


def test_without_classes_it_gives_features_and_a_whole_sequence_is_refused() -> None:
    assert_same_logits(student(num_classes=0), images())
    with pytest.raises(ValueError, match="global_pool"):
        student(num_classes=0, global_pool="").for_inference()
