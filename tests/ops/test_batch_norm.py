"""Batch norm, shortcut and ReLU as one operation: against PyTorch in float64, and where PyTorch's own stay."""

import subprocess
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from coadvise.costs.count import NORM, Tally
from coadvise.ops import FusedSequential, batch_norm, batch_norm_relu, native

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
needs_native = pytest.mark.skipif(
    batch_norm._kernels() is None, reason="no native kernel: no compiler, or switched off"
)


def layer(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=0.3)
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def images(channels: int, size: tuple[int, int] = (6, 8), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, channels, *size).to(dtype).contiguous(memory_format=torch.channels_last)


def plain(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
    out = norm(x) if shortcut is None else norm(x) + shortcut
    return F.relu(out) if relu else out


def results(
    function: Callable[..., Tensor], norm: nn.Module, inputs: list[Tensor], relu: bool, grad: Tensor
) -> list[Tensor]:
    """Output, then gradients of the inputs and of the weights."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(norm, *inputs, relu=relu)
    return [out.detach(), *torch.autograd.grad(out, (*inputs, *norm.parameters()), grad)]


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).norm() <= tolerance * wanted.double().norm()


class Names(TorchDispatchMode):
    """The operators that are called while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def calls(function: Callable[[], Any]) -> int:
    """How often our operator is called."""
    with Names() as names:
        function()
    return names.seen.count("batch_norm_relu")


@needs_native
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "channels", [4, 12, 16, 80, 130, 384]
)  # under a vector, no multiple, in blocks and beside them
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_agrees_with_pytorch_in_float64(relu: bool, with_shortcut: bool, channels: int, dtype: torch.dtype) -> None:
    norm = layer(channels)
    reference = deepcopy(norm).double()
    inputs, grad = [images(channels, dtype=dtype) for _ in range(1 + with_shortcut)], images(channels, dtype=dtype)
    found = results(batch_norm_relu, norm, inputs, relu, grad)
    wanted = results(plain, reference, [tensor.double() for tensor in inputs], relu, grad.double())
    assert found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for got, want in zip(found, wanted, strict=True):
        assert_near(got, want, TOLERANCE[dtype])
    assert_near(norm.running_mean, reference.running_mean, 1e-6)
    assert_near(norm.running_var, reference.running_var, 1e-6)
    assert norm.num_batches_tracked == reference.num_batches_tracked == 1
    assert calls(lambda: batch_norm_relu(deepcopy(norm), *inputs, relu=relu)) == 1
    norm.eval()
    reference.eval()
    before = deepcopy(norm.state_dict())
    with torch.no_grad():
        assert calls(lambda: batch_norm_relu(norm, *inputs, relu=relu)) == 1
        exact = plain(reference, *[tensor.double() for tensor in inputs], relu=relu)
        assert_near(batch_norm_relu(norm, *inputs, relu=relu), exact, TOLERANCE[dtype])
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


@needs_native
def test_values_far_from_zero_keep_their_variance() -> None:
    norm, x = layer(16), images(16, (32, 32)) + 1000.0
    assert_near(batch_norm_relu(norm, x, relu=False), plain(deepcopy(norm).double(), x.double(), relu=False), 1e-4)


@needs_native
def test_neither_threads_nor_repetition_change_a_bit() -> None:
    norm, inputs, grad = layer(24), [images(24, (48, 64)), images(24, (48, 64))], images(24, (48, 64))
    first = results(batch_norm_relu, norm, inputs, True, grad)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for got, want in zip(results(batch_norm_relu, norm, inputs, True, grad), first, strict=True):
            assert torch.equal(got, want)


@needs_native
def test_numbers_that_are_none_reach_the_output() -> None:
    norm, x = layer(16).eval(), images(16)
    x[0, 3, 1, 1], x[1, 4, 0, 0] = float("nan"), float("inf")
    with torch.no_grad():
        for dtype in TOLERANCE:
            assert torch.equal(batch_norm_relu(norm, x.to(dtype)).isnan(), plain(norm, x.to(dtype)).isnan())


@needs_native
def test_gradients_of_gradients_are_those_of_pytorch() -> None:
    norm, inputs = layer(8), [images(8).requires_grad_(), images(8).requires_grad_()]
    found = []
    for function in (batch_norm_relu, plain):
        first = torch.autograd.grad(function(norm, *inputs).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), (*inputs, norm.weight)))
    for got, want in zip(*found, strict=True):
        assert_near(got, want, 1e-4)


def hooked(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.register_forward_hook(lambda module, args, out: out)
    return norm


@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (layer(16), images(16).contiguous()),
        (layer(3), images(3, (5, 5))),  # 100 pixels are no multiple of 16
        (layer(16), images(16).double()),
        (layer(16).eval(), images(16)),  # with gradients
        (hooked(layer(16)), images(16)),
        (nn.BatchNorm2d(16, affine=False), images(16)),
        (nn.BatchNorm2d(16, momentum=None), images(16)),
        (nn.BatchNorm2d(16, track_running_stats=False), images(16)),
        (nn.Identity(), images(16)),
    ],
)
def test_elsewhere_pytorch_does_it(norm: nn.Module, x: Tensor) -> None:
    norm, other = norm.to(x.dtype), deepcopy(norm).to(x.dtype)
    assert calls(lambda: batch_norm_relu(deepcopy(norm), x.clone())) == 0
    torch.testing.assert_close(batch_norm_relu(norm, x.clone()), plain(other, x))


def test_without_a_compiler_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: Any, *flags: str) -> None:
        raise subprocess.SubprocessError("gcc: error: none here")

    for function in (native.load, batch_norm._kernels):
        function.cache_clear()
    monkeypatch.setattr(native, "build", missing)
    try:
        with pytest.warns(RuntimeWarning, match="batch norm runs in plain PyTorch"):
            assert calls(lambda: batch_norm_relu(layer(16), images(16))) == 0
    finally:
        for function in (native.load, batch_norm._kernels):
            function.cache_clear()


def test_a_sequence_is_that_of_pytorch_under_the_same_names() -> None:
    parts = OrderedDict(
        conv=nn.Conv2d(3, 16, 1), norm=layer(16), act=nn.ReLU(), last=layer(16), end=nn.Conv2d(16, 4, 1)
    )
    ours = FusedSequential(parts).to(memory_format=torch.channels_last)
    theirs = nn.Sequential(deepcopy(parts))
    x = images(3)
    assert_near(ours(x), theirs(x), 1e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    heard = []
    ours.act.register_forward_hook(lambda module, args, out: heard.append(out))
    ours(x)
    assert len(heard) == 1


@needs_native
def test_a_plan_counts_one_norm_whether_it_is_for_this_processor_or_not() -> None:
    module = FusedSequential(layer(16), nn.ReLU()).eval()
    for off in (False, True):
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.no_grad(),
            batch_norm.switched_off(off),
            Tally() as tally,
        ):
            x = torch.empty(4, 16, 6, 8).to(memory_format=torch.channels_last)
            assert calls(lambda x=x: module(x)) == (not off)
        assert tally.work[NORM].calls == 1


def test_exports_have_pytorch_s() -> None:
    module = FusedSequential(layer(16), nn.ReLU()).eval()
    graph = torch.export.export(module, (images(16),)).graph
    assert not [node for node in graph.nodes if "coadvise" in str(node.target)]
