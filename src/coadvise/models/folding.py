"""Batch norm folded into the layer before it, for any network in evaluation mode.

There batch norm is a fixed scale and shift of each channel, so a convolution (or linear layer) whose output goes into
it and nowhere else can do both: W' = s W and b' = s (b - mean) + shift with s = gain / sqrt(variance + eps).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)

# Relative to the largest value: far above what rounding makes of two orders of the same arithmetic, far below what
# another function gives.
_TOLERANCE = 1e-3


def sample_images(in_chans: int, size: int) -> Tensor:
    """Return two images of noise, [2, in_chans, size, size]; the global generator is left alone."""
    return torch.rand(2, in_chans, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def fold_batch_norms(network: nn.Module, sample: Tensor) -> nn.Module:
    """Return a frozen copy in evaluation mode that computes the same, to float error, with fewer batch norms.

    Pairs are found by following the data of one forward pass, so it does not matter how the network is written. A batch
    norm stays where its input is not the output of one such layer alone, where that layer's output is also used
    elsewhere, or where folding it into the layer changes what the two compute (as with standardised weights).

    Args:
        network: Maps one tensor to one tensor.
        sample: An input, of any values; a few small images will do.
    """
    unfolded = copy.deepcopy(network).eval().requires_grad_(False)
    folded = copy.deepcopy(unfolded)
    with torch.autocast(sample.device.type, enabled=False):  # whose rounding would hide that the two are the same
        for trace in _pairs(folded, sample):
            if (layer := trace.folded()) is not None:
                folded.set_submodule(trace.layer_name, layer)
                folded.set_submodule(trace.norm_name, _rest_of(trace.norm))
        other = 1 - sample
        return folded if _close(folded(other), unfolded(other)) else unfolded


class _Pair:
    """A layer and the batch norm that reads its output."""

    def __init__(
        self, layer_name: str, layer: nn.Conv2d | nn.Linear, norm_name: str, norm: nn.BatchNorm2d, x: Tensor, y: Tensor
    ) -> None:
        self.layer_name, self.layer, self.norm_name, self.norm, self.x, self.y = (
            layer_name,
            layer,
            norm_name,
            norm,
            x,
            y,
        )

    def folded(self) -> nn.Module | None:
        """The layer with the batch norm in it; None where that is not the same function."""
        norm, layer = self.norm, copy.deepcopy(self.layer)
        if norm.running_mean is None or norm.running_var is None:  # it normalises by the batch at hand
            return None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double() * scale
        if norm.affine:
            scale = scale * norm.weight.double()
            shift = shift * norm.weight.double() + norm.bias.double()
        if self.y.shape[1] != layer.weight.shape[0]:  # a linear layer of sequences: its channels come last
            return None
        dtype, column = layer.weight.dtype, [-1] + [1] * (layer.weight.ndim - 1)
        bias = shift if layer.bias is None else scale * layer.bias.double() + shift
        weight = scale.view(column) * layer.weight.double()
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        channels = [1, -1] + [1] * (self.y.ndim - 2)
        by_both = self.y.double() * scale.view(channels) + shift.view(channels)
        return layer if _close(layer(self.x).double(), by_both) else None


def _rest_of(norm: nn.Module) -> nn.Module:
    """What a batch norm does beside scale and shift: timm's may have an activation in it."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


class _Uses(TorchDispatchMode):
    """Counts the operators that read each watched tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}  # by id(); whoever watches a tensor keeps it alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.counts:
                self.counts[id(leaf)] += 1
        return func(*args, **(kwargs or {}))


def _pairs(network: nn.Module, sample: Tensor) -> Iterator[_Pair]:
    """Layers called once whose output is read by one operator, within a batch norm that is called once."""
    uses, handles = _Uses(), []
    outputs: dict[int, tuple[str, nn.Module, Tensor, Tensor]] = {}
    readers: dict[str, list[Tensor | None]] = {}  # by batch norm: the outputs it read
    calls: dict[str, int] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        outputs[id(output)] = (name, module, args[0].clone(), output)
        uses.counts[id(output)] = 0

    def read(name: str, args: tuple[Tensor, ...]) -> None:
        readers.setdefault(name, []).append(args[0] if id(args[0]) in outputs else None)

    for name, module in network.named_modules():
        if isinstance(module, _LINEAR):
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: keep(name, m, args, out)))
        elif type(module) in _NORMS:
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: read(name, args)))
    with uses:
        network(sample)
    for handle in handles:
        handle.remove()
    for norm_name, inputs in readers.items():
        if len(inputs) == 1 and inputs[0] is not None and uses.counts[id(inputs[0])] == 1:
            layer_name, layer, x, y = outputs[id(inputs[0])]
            if calls[layer_name] == 1:
                norm = cast(nn.BatchNorm2d, network.get_submodule(norm_name))
                yield _Pair(layer_name, cast(nn.Conv2d, layer), norm_name, norm, x, y)


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())
