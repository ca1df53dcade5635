"""The operator's meaning, its registration with PyTorch, its layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coadvise.errors import UserError
from coadvise.ops import Involution2d, involution2d
from coadvise.ops.reference import involution2d_backward_reference, involution2d_reference, memory_format


def sample(
    channels: int = 8, groups: int = 2, kernel: int = 3, stride: int = 1, size: tuple[int, int] = (5, 6), **options
) -> tuple[Tensor, Tensor]:
    """x [2, C, H, W] and weight [2, G, K, K, h, w]."""
    height, width = (-(-side // stride) for side in size)
    x = torch.randn(2, channels, *size, **options)
    return x, torch.randn(2, groups, kernel, kernel, height, width, **options)


def by_loops(x: Tensor, weight: Tensor, stride: int, dilation: int = 1) -> Tensor:
    """The formula of the paper, one output position at a time."""
    batch, channels, _, _ = x.shape
    groups, kernel, height, width = weight.shape[1], *weight.shape[3:]
    pad, reach = (kernel - 1) // 2 * dilation, (kernel - 1) * dilation + 1
    padded = F.pad(x, (pad, pad, pad, pad))
    out = torch.empty(batch, channels, height, width, dtype=x.dtype)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                rows, columns = (slice(at * stride, at * stride + reach, dilation) for at in (i, j))
                window = padded[:, c, rows, columns]
                out[:, c, i, j] = (window * weight[:, c // (channels // groups), :, :, i, j]).sum((1, 2))
    return out


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_reference_is_the_papers_formula(kernel: int, stride: int) -> None:
    x, weight = sample(kernel=kernel, stride=stride, dtype=torch.float64)
    torch.testing.assert_close(involution2d_reference(x, weight, stride), by_loops(x, weight, stride))


@pytest.mark.parametrize(("stride", "dilation"), [(1, 2), (1, 3), (2, 2), (2, 3), (3, 2), (2, 4), (4, 6)])
@pytest.mark.parametrize("size", [(5, 6), (13, 8), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # plain PyTorch, and the C kernel
def test_dilation(stride: int, dilation: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = sample(stride=stride, size=size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    found = involution2d(x, weight, stride, dilation)
    torch.testing.assert_close(found, by_loops(x, weight, stride, dilation).contiguous(memory_format=memory_format(x)))
    assert found.is_contiguous(memory_format=memory_format(x))


def test_derivatives_with_dilation() -> None:
    inputs = tuple(t.requires_grad_() for t in sample(4, 2, 3, 2, (5, 4), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, weight: involution2d(x, weight, 2, 3), inputs)


def test_a_dilated_layer_reaches_further_and_exports() -> None:
    layer = Involution2d(32, 3, dilation=2).eval()
    x = torch.randn(2, 32, 9, 9, requires_grad=True)
    weight = torch.randn(2, layer.groups, 3, 3, 9, 9)
    (reached,) = torch.autograd.grad(involution2d(x, weight, 1, 2)[:, :, 4, 4].sum(), x)
    assert sorted({*reached.abs().sum((0, 1)).nonzero()[:, 0].tolist()}) == [2, 4, 6]
    auto = torch.export.Dim.AUTO
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    other = torch.randn(3, 32, 7, 12)
    torch.testing.assert_close(program.module()(other), layer(other))
    assert "dilation=2" in repr(layer)


@pytest.mark.parametrize("stride", [1, 2])
def test_written_out_gradients_are_autograds(stride: int) -> None:
    x, weight = (t.requires_grad_() for t in sample(stride=stride, dtype=torch.float64))
    out = involution2d_reference(x, weight, stride)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (x, weight), grad)
    torch.testing.assert_close(involution2d_backward_reference(grad, x, weight, stride), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_first_and_second_derivatives(stride: int) -> None:
    inputs = tuple(t.requires_grad_() for t in sample(4, 2, 3, stride, (3, 4), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, weight: involution2d(x, weight, stride), inputs)
    assert torch.autograd.gradgradcheck(lambda x, weight: involution2d(x, weight, stride), inputs, fast_mode=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_registration_passes_pytorchs_own_checks(channels_last: bool) -> None:
    x, weight = sample(32, 2)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    grad = torch.randn(2, 32, 5, 6)
    torch.library.opcheck(torch.ops.coadvise.involution2d_backward.default, (grad, x, weight, 1))
    inputs = (x.requires_grad_(), weight.requires_grad_(), 1)
    torch.library.opcheck(torch.ops.coadvise.involution2d.default, inputs)


def test_exports_as_one_node_for_any_batch_and_size() -> None:
    layer = Involution2d(32, 3, stride=2).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(layer, (torch.randn(2, 32, 9, 8),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    assert [n.target for n in program.graph.nodes if "involution" in str(n.target)] == [
        torch.ops.coadvise.involution2d.default
    ]
    x = torch.randn(3, 32, 7, 12)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_autocast_gives_one_dtype() -> None:
    layer, x = Involution2d(32, 3), torch.randn(2, 32, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)  # x is float32, the generated weight bfloat16
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(out.float(), layer(x), atol=0.05, rtol=0.05)
    x, weight = sample(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert involution2d(x, weight).dtype == torch.float64


def test_a_compiled_graph_knows_autocast() -> None:
    x, weight = sample()
    compiled = torch.compile(involution2d, backend="aot_eager", fullgraph=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert compiled(x, weight.bfloat16(), 1).dtype == involution2d(x, weight.bfloat16()).dtype == dtype


def test_float16_runs_in_plain_torch_on_a_cpu() -> None:
    x, weight = (t.half() for t in sample())
    assert torch.equal(involution2d(x, weight), involution2d_reference(x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "stride", "message"),
    [
        (torch.zeros(8, 5, 6), torch.zeros(2, 2, 3, 3, 5, 6), 1, "must be \\[B, C, H, W\\]"),
        (torch.zeros(2, 8, 5, 6), torch.zeros(2, 18, 5, 6), 1, "unflatten"),
        (torch.zeros(2, 8, 5, 6), torch.zeros(2, 2, 3, 3, 5, 6), 1.0, "stride is 1.0; it must be a whole number"),
        (torch.zeros(2, 8, 5, 6), torch.zeros(2, 2, 4, 4, 5, 6), 1, "4 wide; it must be odd"),
        (torch.zeros(2, 8, 5, 6), torch.zeros(2, 3, 3, 3, 5, 6), 1, "3 groups for 8 channels"),
        (torch.zeros(2, 8, 5, 6), torch.zeros(2, 2, 3, 3, 2, 3), 2, "must be \\[2, 2, 3, 3, 3, 3\\]"),
        (torch.zeros(2, 8, 5, 6), torch.zeros(2, 2, 3, 5, 5, 6), 1, "one square kernel"),
        (torch.zeros(2, 8, 5, 6), torch.zeros(2, 2, 3, 3, 5, 6, device="meta"), 1, "weight on meta"),
        (torch.zeros(2, 8, 5, 6).int(), torch.zeros(2, 2, 3, 3, 5, 6).int(), 1, "floating point"),
        (torch.zeros(2, 8, 5, 6), torch.zeros(2, 2, 3, 3, 5, 6).double(), 1, "weight torch.float64"),
    ],
)
def test_faulty_inputs_are_named(x: Tensor, weight: Tensor, stride: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        involution2d(x, weight, stride)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"stride": 0}, "stride is 0"),
        ({"channels": 24}, "group_channels=16 does not divide channels=24"),
    ],
)
def test_faulty_layers_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Involution2d(**{"channels": 32, "kernel_size": 3} | arguments)


def test_layer_has_the_published_keys() -> None:
    shapes = {name: tuple(t.shape) for name, t in Involution2d(32, 7).state_dict().items() if "running" not in name}
    assert shapes == {
        "conv1.conv.weight": (8, 32, 1, 1),
        "conv1.bn.weight": (8,),
        "conv1.bn.bias": (8,),
        "conv1.bn.num_batches_tracked": (),
        "conv2.conv.weight": (98, 8, 1, 1),
        "conv2.conv.bias": (98,),
    }


def test_fewer_channels_than_a_group_form_one_group() -> None:
    layer = Involution2d(12, 3)
    assert layer.groups == 1
    assert layer(torch.randn(2, 12, 4, 4)).shape == (2, 12, 4, 4)
