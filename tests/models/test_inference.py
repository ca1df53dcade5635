"""The student made for inference answers as the student does, by every way it can be run."""

import copy
from itertools import combinations
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coadvise.models import Student, inference
from coadvise.ops import attention, convolution, onednn

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
    assert net.for_inference()(images()).shape == (2, 5)


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
    assert net.for_inference()(x).shape == (batch, 5)
    assert_same_logits(net, x)


@pytest.mark.parametrize("name", ["cit_tiny_patch16_224", "cit_small_aligned_patch16_224"])
def test_the_papers_sizes(name: str) -> None:
    net = timm.create_model(name, depth=2, img_size=64).eval()
    assert isinstance(net, Student)
    assert_same_logits(net, images(64))


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
    three = 3 * (made.prefix.shape[1] + 64) * 96  # values: 64 patches, 4 x 24 hidden
    for autocast, size in ((False, 4), (True, 2)):
        seen.clear()
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            whole = made(images(batch=7))
            patch.setattr(inference, "CHUNK", three * size + 1)
            in_pieces = made(images(batch=7))
        tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {}
        torch.testing.assert_close(in_pieces, whole, **tolerance)
        assert seen == [7, 3, 3, 1]


@pytest.mark.parametrize("patch", [4, 8])
@pytest.mark.parametrize("native", [True, False])
def test_operators_for_large_layers_on_small_ones(patch: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and convolution._library() is None:
        pytest.skip("no native kernel: no compiler, or switched off")
    taken: list[tuple[int, ...]] = []
    conv, attend = convolution.conv3x3_relu, attention.attention
    monkeypatch.setattr(onednn, "MUCH", 0)
    monkeypatch.setattr(onednn, "has_amx", True)
    monkeypatch.setattr(convolution, "conv3x3_relu", lambda *tensors: taken.append(tensors[1].shape) or conv(*tensors))
    monkeypatch.setattr(attention, "attention", lambda qkv, heads: taken.append(qkv.shape[1:]) or attend(qkv, heads))
    if not native:
        for module in (attention, convolution):
            monkeypatch.setattr(module, "takes", lambda *args: False)
    net = student(aligned=BOTH, patch_size=patch, embed_dim=192)
    for batch in (0, 1, 3):
        assert_same_logits(net, images(batch=batch))
    halved = [(64, 64, 3, 3)] if patch == 4 else [(64, 64, 3, 3), (64, 64, 3, 3), (64, 32, 3, 3)]
    assert taken == ([*halved, ((32 // patch) ** 2 + 3, 3 * 192)] * 2 if native else [])
    compiled = torch.compile(net.for_inference(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), net(images()), rtol=1e-5, atol=1e-5)
    taken.clear()
    x, y = images().requires_grad_(), images().requires_grad_()
    net(x).sum().backward()
    net.for_inference()(y).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-5)
    for has_amx in (True, False):
        monkeypatch.setattr(onednn, "has_amx", has_amx)
        with torch.no_grad():
            wanted = net(images())
            with torch.autocast("cpu", torch.bfloat16):
                rounded = net.for_inference()(images())
        assert (rounded - wanted).square().mean().sqrt() < 0.03 * wanted.std()
        assert taken == ([] if has_amx or not native else halved), "a gradient is wanted, or oneDNN has AMX"


@pytest.mark.parametrize("stem", ["conv", "inv"])
def test_a_batch_norm_that_stays_in_a_stem(stem: str) -> None:
    net = student(aligned=BOTH)
    last = [module for module in net.patch_embed.stems[stem].modules() if isinstance(module, _BatchNorm)][-1]
    last.running_mean = last.running_var = None  # it normalises by the batch at hand
    assert_same_logits(net, images())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_where_onednn_lacks_its_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "MUCH", 0)
    monkeypatch.setattr(onednn, "_dtypes", (torch.float32,))
    monkeypatch.setattr(onednn, "_linear", lambda *args: pytest.fail("taken"))
    monkeypatch.setattr(onednn, "_convolution", lambda *args: pytest.fail("taken"))
    net = student(aligned=BOTH)
    with torch.no_grad():
        wanted = net(images())
        with torch.autocast("cpu", dtype):
            made = net.for_inference()(images())
    assert (made - wanted).square().mean().sqrt() < 0.03 * wanted.std()


def test_autocast_leaves_float64_alone() -> None:
    net = student(aligned=BOTH).double()
    x = images().double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net.for_inference()(x), net(x), rtol=1e-9, atol=1e-9)


def test_weights_rounded_in_inference_mode_serve_a_gradient() -> None:
    made = student(aligned=BOTH).for_inference()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            first = made(images())
        x = images().requires_grad_()
        again = made(x)
        again.float().sum().backward()
    torch.testing.assert_close(again.detach(), first)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_weights_changed_between_two_calls_are_rounded_anew() -> None:
    net = student(aligned=BOTH)
    made = net.for_inference()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = made(images())
        for name, weight in made.named_parameters():
            if "head" not in name:
                weight.mul_(2)
        second = made(images())
        assert not torch.equal(first, second)
        torch.testing.assert_close(second, copy.deepcopy(made)(images()))
        made.last.mlp[0].weight = nn.Parameter(torch.zeros_like(made.last.mlp[0].weight), requires_grad=False)
        third = made(images())
        assert not torch.equal(second, third)
        torch.testing.assert_close(third, copy.deepcopy(made)(images()))


@pytest.mark.parametrize("inference", [False, True])
def test_weights_loaded_between_two_calls_answer_under_autocast(inference: bool) -> None:
    with torch.inference_mode(inference):
        made = student(aligned=BOTH).for_inference()
    another = student(aligned=BOTH)
    with torch.no_grad():
        for weight in another.parameters():
            weight.mul_(1.5)
    other = another.for_inference()
    with torch.no_grad(), torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        first = made(images())
        assert not torch.equal(first, other(images()))
        made.load_state_dict(other.state_dict())
        torch.testing.assert_close(made(images()), other(images()))
        norms = {name: 2 * value for name, value in made.state_dict().items() if name.startswith("norm.")}
        assert norms
        made.load_state_dict(norms, strict=False)
        torch.testing.assert_close(made(images()), copy.deepcopy(made)(images()))
        if not inference:
            made.prefix.mul_(2)
            torch.testing.assert_close(made(images()), copy.deepcopy(made)(images()))


def test_under_autocast_too_a_gradient_is_that_of_its_weights() -> None:
    made = student(aligned=BOTH).for_inference().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        made(images()).float().sum().backward()
    assert all(weight.grad is not None for weight in made.parameters())


@pytest.mark.parametrize("aligned", [None, BOTH])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_compiles_as_one_graph_and_exports(aligned: dict[str, str] | None, layout: torch.memory_format) -> None:
    net = student(aligned=aligned)
    x = images().contiguous(memory_format=layout)
    made = net.for_inference()
    with torch.no_grad():
        wanted = net(x)
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        exported = torch.export.export(made, (x,), dynamic_shapes=(batch,)).module()
        torch.testing.assert_close(exported(x), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exported(images(batch=5)), net(images(batch=5)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aligned", [None, BOTH])
def test_in_place_its_pieces_are_compiled(aligned: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    net = student(aligned=aligned)
    made = net.for_inference()
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    made.compile(fullgraph=True, backend=backend, dynamic=True)
    monkeypatch.setattr(inference, "CHUNK", 3 * (made.prefix.shape[1] + 64) * 96 * 4 + 1)
    with torch.no_grad():
        torch.testing.assert_close(made(images(batch=8)), net(images(batch=8)), rtol=1e-5, atol=1e-5)
        before = len(seen)
        torch.testing.assert_close(made(images(batch=11)), net(images(batch=11)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(made)(images()), net(images()), rtol=1e-5, atol=1e-5)
    assert before > 0
    assert len(seen) == before, "pieces of three and of two were compiled"


def test_pieces_compiled_under_autocast_get_rounded_weights() -> None:
    net = student(aligned=BOTH)
    made = net.for_inference()
    matrices: list[torch.dtype] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        matrices.extend(x.dtype for x in inputs if isinstance(x, nn.Parameter) and x.ndim > 1)
        return graph.forward

    made.compile(fullgraph=True, backend=backend)
    with torch.no_grad():
        wanted = net(images())
        with torch.autocast("cpu", torch.bfloat16):
            rounded, again = made(images()), made(images())
        assert matrices
        assert set(matrices) == {torch.bfloat16}
        torch.testing.assert_close(made(images()), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(rounded, again)
    assert (rounded - wanted).square().mean().sqrt() < 0.03 * wanted.std()


def test_what_the_answer_does_not_need_is_not_there() -> None:
    net = student(aligned=BOTH)
    made = net.for_inference()
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


def test_making_it_draws_nothing_and_leaves_the_mode() -> None:
    net = student(aligned=BOTH).train()
    state = torch.get_rng_state()
    net.for_inference()
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training


def test_without_classes_it_gives_features_and_a_whole_sequence_is_refused() -> None:
    assert_same_logits(student(num_classes=0), images())
    with pytest.raises(ValueError, match="global_pool"):
        student(num_classes=0, global_pool="").for_inference()
