"""Every network that the paper names, with its size and speed here, and the paper's figure beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.floor import operations
from benchmarks.table import Setting, machine
from coadvise.evaluation.speed import interleaved

SIZE = 224  # pixels


@dataclass(frozen=True)
class Entry:
    """A network of the paper.

    Attributes:
        role: What the paper uses it as.
        name: The paper's name.
        model, arguments: What ``timm.create_model`` makes it from.
        paper: The paper's parameters in millions, as printed there; empty where it gives none.
        reason: Why ours differ, where it is not the rounding.
    """

    role: str
    name: str
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    reason: str = ""

    def create(self) -> nn.Module:
        """Build it, untrained, for 1000 classes, in evaluation mode."""
        return timm.create_model(self.model, **self.arguments).eval()

    def create_on_meta(self) -> nn.Module:
        """Build it with shapes alone, on PyTorch's meta device."""
        try:
            with torch.device("meta"):
                return self.create()
        except NotImplementedError:  # timm before 1.0.30 computes RegNets' widths as tensors
            return self.create().to("meta")

    def difference(self, millions: float) -> str:
        """Say how our parameters differ from the paper's: by rounding, by cutting, or by ``reason``."""
        if not self.paper:
            return "not given"
        scale = 10 ** len(self.paper.partition(".")[2])
        if round(millions * scale) == round(float(self.paper) * scale):
            return "rounds to it"
        if math.floor(millions * scale) == round(float(self.paper) * scale):
            return "cut there, not rounded"
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


@dataclass(frozen=True)
class Row:
    """A network's figures: parameters and multiply-accumulates of one image in absolute numbers, speed in images/s."""

    entry: Entry
    parameters: int
    macs: int
    images_per_second: float


def count(entry: Entry) -> tuple[int, int]:
    """Count the parameters, and the multiply-accumulates of an image."""
    model = entry.create_on_meta()
    return sum(p.numel() for p in model.parameters()), operations(model, SIZE) // 2


@torch.inference_mode()
def images_per_second(entry: Entry, setting: Setting) -> float:
    """Time the network in float32, channels last; the median of the setting's repeats, after one that warms up."""
    shape = (setting.batch_size, 3, SIZE, SIZE)
    images = torch.rand(shape, device=setting.device).contiguous(memory_format=torch.channels_last)
    model = entry.create().to(setting.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seconds = interleaved({entry.name: lambda: model(images)}, setting.repeats, setting.synchronise)
    return setting.batch_size / seconds[entry.name]


def measure(setting: Setting, entries: Sequence[Entry] = ENTRIES) -> Iterator[Row]:
    """Count and time one network after the other."""
    for entry in entries:
        yield Row(entry, *count(entry), images_per_second(entry, setting))


def default_setting() -> Setting:
    """On a GPU where there is one; few images on a CPU, where the largest network takes seconds for one."""
    if torch.cuda.is_available():
        return Setting(torch.device("cuda"), batch_size=128, repeats=5)
    return Setting(torch.device("cpu"), batch_size=4, repeats=3)


_BEFORE = """\
# Networks

Every network that the paper names, as `timm.create_model(model, **arguments)` makes it after `import coadvise`. This
file is made by

```sh
python -m benchmarks networks > docs/MODELS.md
```

Parameters are those of the whole network with 1000 classes, multiply-accumulates (MACs) those of the class token's
answer for one image of 224 pixels. Images/s: {timing}.

| role | network | model | parameters, M | the paper's | difference | MACs, G | images/s |
| --- | --- | --- | --- | --- | --- | --- | --- |"""

_AFTER = """
The paper's throughputs are of another machine and are not put beside these.

MACs are those of matrix products, convolutions and involutions, as `torch.utils.flop_counter` finds them. An involution
is registered there with K² for each number that it makes. RedNet's authors give 1.73, 2.22, 2.71, 4.74 and 6.79 G, 2 to
3 % more: their counter takes norms, activations, pooling and biases in, which is most of it."""


def document(rows: Iterable[Row], setting: Setting) -> Iterator[str]:
    """The lines of docs/MODELS.md."""
    where = ", ".join(f"{key} {value}" for key, value in machine(setting).items())
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = "; other programs kept it busy, so the speeds say little" if load > cores else ""
    timing = f"batches of {setting.batch_size}, channels last, median of {setting.repeats}; {where}"
    yield from _BEFORE.format(timing=f"{timing}, load {load:.1f} on {cores} cores as it began{busy}").splitlines()
    for row in rows:
        entry, millions = row.entry, row.parameters / 1e6
        arguments = "".join(f", {key}={value!r}" for key, value in entry.arguments.items())
        cells = (
            entry.role, entry.name, f"`{entry.model}{arguments}`", f"{millions:.3f}", entry.paper or "–",
            entry.difference(millions), f"{row.macs / 1e9:.3f}", f"{row.images_per_second:.3g}",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield from _AFTER.splitlines()
