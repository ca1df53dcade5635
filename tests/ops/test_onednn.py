"""oneDNN's layers are PyTorch's, in graphs too."""

import pytest
import torch
from torch import nn

from coadvise.ops import onednn


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 100, 96, 384), (1000, 384, 96)])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("there", [True, False])
def test_linear_is_pytorchs_and_has_its_gradient(
    shape: tuple[int, ...], gelu: bool, biased: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = getattr(onednn._onednn, "_linear_pointwise", None) if there else None
    monkeypatch.setattr(onednn, "_linear", taken)
    *rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator) if biased else None
    wanted = nn.functional.linear(x, weight, bias)
    wanted = nn.functional.gelu(wanted) if gelu else wanted
    torch.testing.assert_close(onednn.linear(x, weight, bias, gelu=gelu), wanted, rtol=1e-5, atol=1e-5)
    onednn.linear(x.requires_grad_(), weight, bias, gelu=gelu).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_graph_has_the_same_layer(dtype: torch.dtype, gelu: bool) -> None:
    if onednn._linear is None or dtype not in onednn._dtypes:
        pytest.skip("oneDNN is not taken on this processor")
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((2, 100, 96), (1000, 96), (1000,)))
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    layer = torch.compile(onednn.linear, backend=backend, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert torch.equal(layer(x, weight, bias, gelu=gelu), onednn.linear(x, weight, bias, gelu=gelu))
    assert "coadvise.linear.default" in seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_is_registered_as_pytorch_wants_it(dtype: torch.dtype) -> None:
    if onednn._linear is None or dtype not in onednn._dtypes:
        pytest.skip("oneDNN is not taken on this processor")
    x, weight, bias = torch.randn(2, 3, 8).to(dtype), torch.randn(5, 8).to(dtype), torch.randn(5).to(dtype)
    for arguments in ((x, weight, bias, True), (x, weight, None, False)):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.coadvise.linear, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("held_to", "processor", "has_amx"),
    [
        (None, True, True),
        (None, False, False),
        ("default", True, True),
        ("AVX512_CORE_AMX", True, True),
        ("AVX512_CORE_BF16", True, False),
        ("AVX2", True, False),
    ],
)
def test_amx_is_what_onednn_may_use(
    held_to: str | None, processor: bool, has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: processor)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if held_to:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held_to)
    assert onednn._takes_amx() is has_amx


def test_mixed_precisions_stay_an_error_without_autocast() -> None:
    x, weight = torch.randn(400, 100), torch.randn(1000, 100)
    with pytest.raises(RuntimeError, match="dtype"):
        onednn.linear(x, weight.bfloat16(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(x, weight, None).dtype == torch.bfloat16
