"""Makes docs/MODELS.md: every network the paper names, its size and arithmetic here, and the paper's figures."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

import coadvise.models  # noqa: F401  (registers the networks with timm)
from benchmarks.floor import operations

SIZE = 224  # pixels


@dataclass(frozen=True)
class Entry:
    """A network of the paper.

    Attributes:
        role, name: as in the paper.
        model, arguments: of `timm.create_model`.
        paper: the paper's parameters in millions, as printed there; empty if it gives none.
        reason: why ours differ, if not by rounding.
    """

    role: str
    name: str
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    reason: str = ""

    def create(self) -> nn.Module:
        """Builds it with 1000 classes and random weights, in evaluation mode."""
        return timm.create_model(self.model, **self.arguments).eval()

    def create_on_meta(self) -> nn.Module:
        """Builds it with shapes alone, on PyTorch's meta device."""
        try:
            with torch.device("meta"):
                return self.create()
        except NotImplementedError:  # timm before 1.0.30 computes RegNets' widths as tensors
            return self.create().to("meta")

    def difference(self, millions: float) -> str:
        """How our parameters differ from the paper's: by rounding, by truncation, or by `reason`."""
        if not self.paper:
            return "not given"
        scale = 10 ** len(self.paper.partition(".")[2])
        if round(millions * scale) == round(float(self.paper) * scale):
            return "rounds to it"
        if math.floor(millions * scale) == round(float(self.paper) * scale):
            return "truncated in the paper"
        return self.reason


CNN, INVOLUTION, OTHER, TRANSFORMER, OURS = (
    "conv teacher", "inv teacher", "student of other bias", "transformer", "Co-advise",
)  # fmt: skip
ENTRIES = (
    Entry(CNN, "ResNet-18", "resnet18"),
    Entry(CNN, "ResNet-34", "resnet34"),
    Entry(CNN, "ResNet-50", "resnet50", paper="25.6"),
    Entry(CNN, "ResNet-101", "resnet101", paper="44.5"),
    Entry(CNN, "ResNet-152", "resnet152"),
    Entry(CNN, "RegNetY-200MF", "regnety_002"),
    Entry(CNN, "RegNetY-400MF", "regnety_004"),
    Entry(CNN, "RegNetY-600MF", "regnety_006", paper="6.1"),
    Entry(CNN, "RegNetY-4GF", "regnety_040", paper="20.6"),
    Entry(CNN, "RegNetY-8GF", "regnety_080", paper="39.2"),
    Entry(CNN, "RegNetY-16GF", "regnety_160", paper="84"),
    Entry(INVOLUTION, "RedNet-26", "rednet26", paper="9.2"),
    Entry(INVOLUTION, "RedNet-38", "rednet38"),
    Entry(INVOLUTION, "RedNet-50", "rednet50", paper="15.5"),
    Entry(INVOLUTION, "RedNet-101", "rednet101", paper="25.6"),
    Entry(INVOLUTION, "RedNet-152", "rednet152", paper="34.0"),
    Entry(OTHER, "ResNet-10, one output", "resnet10_coadvised", {"token_names": []}),
    Entry(OTHER, "ResNet-10, separate heads", "resnet10_coadvised"),
    Entry(OTHER, "Mixer-Ti, one output", "mixer_tiny_coadvised", {"token_names": []}),
    Entry(OTHER, "Mixer-Ti, separate heads", "mixer_tiny_coadvised"),
    Entry(TRANSFORMER, "ViT-B/16", "vit_base_patch16_224", paper="86"),
    Entry(
        TRANSFORMER, "ViT-L/16", "vit_large_patch16_224", paper="307",
        reason="printed by ViT's authors, who do not say what they count",
    ),
    Entry(TRANSFORMER, "DeiT-Ti", "deit_tiny_patch16_224", paper="5"),
    Entry(TRANSFORMER, "DeiT-S", "deit_small_patch16_224", paper="22"),
    Entry(TRANSFORMER, "DeiT-Ti distilled", "deit_tiny_distilled_patch16_224", paper="6"),
    Entry(TRANSFORMER, "DeiT-S distilled", "deit_small_distilled_patch16_224", paper="22"),
    Entry(TRANSFORMER, "Transformer-Ti", "cit_tiny_patch16_224", {"token_names": ["conv"]}),
    Entry(OURS, "CiT-Ti", "cit_tiny_patch16_224", paper="6"),
    Entry(OURS, "CiT-S", "cit_small_patch16_224", paper="22"),
    Entry(OURS, "CiT-SAK", "cit_small_aligned_patch16_224", paper="26"),
)  # fmt: skip


def count(entry: Entry) -> tuple[int, int]:
    """The parameters, and the multiply-accumulates of one image."""
    model = entry.create_on_meta()
    return sum(p.numel() for p in model.parameters()), operations(model, SIZE) // 2


_BEFORE = """\
# Networks

Every network the paper names, as `timm.create_model(model, **arguments)` makes it after `import coadvise.models`.
Made by

```sh
python -m benchmarks networks > docs/MODELS.md
```

Parameters: of the whole network, in millions, with 1000 classes. MACs: multiply-accumulates of the class token's output
for one image of 224 × 224 pixels, in billions.

| role | network | model | parameters, M | paper | difference | MACs, G |
| --- | --- | --- | --- | --- | --- | --- |"""

_AFTER = """
MACs count matrix products, convolutions and involutions, by `torch.utils.flop_counter`; an involution counts K² per
output value. RedNet's authors give 1.73, 2.22, 2.71, 4.74 and 6.79 G, which is 2 to 3 % more, mostly because their
counter includes norms, activations, pooling and biases. Speeds: [PERFORMANCE.md](PERFORMANCE.md)."""


def line(entry: Entry) -> str:
    """A network's row of the table."""
    parameters, macs = count(entry)
    arguments = "".join(f", {key}={value!r}" for key, value in entry.arguments.items())
    cells = [entry.role, entry.name, f"`{entry.model}{arguments}`", f"{parameters / 1e6:.3f}", entry.paper or "–"]
    return f"| {' | '.join([*cells, entry.difference(parameters / 1e6), f'{macs / 1e9:.3f}'])} |"


def document() -> Iterator[str]:
    """The lines of docs/MODELS.md."""
    yield from _BEFORE.splitlines()
    yield from map(line, ENTRIES)
    yield from _AFTER.splitlines()
