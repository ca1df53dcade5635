"""oneDNN's layers with their activation in the same pass, for inference on CPUs, where they are the faster.

PyTorch's own compiler calls these operators, no public function does. A build without them, or with other names for
them, gets PyTorch's ordinary layers. In a graph the linear layer is one node, ``coadvise::linear``, without gradient.
"""

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coadvise.ops.register import register

# Multiplications (a tap) from which other operators than PyTorch's ordinary ones are taken: a call takes some
# microseconds more.
MUCH = 10_000_000
_onednn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
# With AVX2 and no more, PyTorch's own linear layers are faster, MKL's: a tenth, and a third with GELU behind them.
_has_avx2_alone = torch.backends.cpu.get_cpu_capability() == "AVX2"
_linear = None if _has_avx2_alone else getattr(_onednn, "_linear_pointwise", None)
_convolution = getattr(_onednn, "_convolution_pointwise", None)
_has_bfloat16 = bool(_onednn and getattr(_onednn, "_is_mkldnn_bf16_supported", bool)())
_dtypes = (torch.float32, torch.bfloat16) if _has_bfloat16 else (torch.float32,)


def _takes_amx() -> bool:
    """Whether this processor has AMX and oneDNN is not held to less."""
    held_to = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)() and ("AMX" in held_to or held_to in ("", "DEFAULT"))


has_amx = _takes_amx()  # then it multiplies bfloat16 so fast that kernels with float32 inside have no place


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """`F.linear`, and GELU behind it if wanted."""
    if _linear is not None and not exporting() and (taken := _taken(x, weight, bias)):
        operator = torch.ops.coadvise.linear.default if torch.compiler.is_compiling() else _linear_now
        y: Tensor = operator(*taken, gelu)
        return y
    return _plain_linear(x, weight, bias, gelu)


def convolution_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution without padding other than zeros, and ReLU behind it."""
    graph = torch.compiler.is_compiling()
    if _convolution is not None and not graph and (taken := _taken(x, conv.weight, conv.bias)):
        y: Tensor = _convolution(*taken, conv.padding, conv.stride, conv.dilation, conv.groups, "relu", [], "")
        return y
    return F.relu(conv(x), inplace=True)


@torch.compiler.assume_constant_result  # what `torch.compile` of PyTorch 2.11 makes of the function in it is True
def exporting() -> bool:
    """Whether a graph for another program is made, which could not read operators of our own."""
    return torch.compiler.is_exporting()


def worthwhile(x: Tensor, products: int) -> bool:
    """Whether so many products a value are enough for operators that only run on a CPU and have no gradient."""
    return x.device.type == "cpu" and not x.requires_grad and x.numel() * products > MUCH


def precision(x: Tensor) -> torch.dtype:
    """What a CPU's layers compute in: autocast's dtype, or that of their input."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _taken(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Input, weight and bias of a layer in the precision that it computes in; None if oneDNN is not to be taken."""
    dtype = precision(x)
    if not worthwhile(x, weight.shape[0]) or dtype not in _dtypes or torch.float64 in (x.dtype, weight.dtype):
        return None
    if weight.dtype != dtype and not torch.is_autocast_enabled("cpu"):
        return None
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _linear_now(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    assert _linear is not None
    y: Tensor = _linear(x, weight, bias, "gelu" if gelu else "none", [], "none")
    return y


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def _empty_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor",
    cpu=_linear_now,
    plain=_plain_linear,
    empty=_empty_linear,
)
