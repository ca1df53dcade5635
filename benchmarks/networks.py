"""Makes docs/MODELS.md: every network the paper names, its size and arithmetic here, and the paper's figures."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

import coadvise.models  # noqa: F401  (registers the networks with timm)
from benchmarks.floor import operations
from coadvise.models.network import on_meta
from coadvise.studies import STUDIES
from coadvise.studies.networks import PAPER_MODELS

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


ROLES = {
    "ResNet": "conv teacher",
    "RegNetY": "conv teacher",
    "RedNet": "inv teacher",
    "ViT": "transformer",
    "DeiT": "transformer",
    "CiT": "Co-advise",
}
REASONS = {"ViT-L/16": "printed by ViT's authors, who do not say what they count"}
OTHER = "student of other bias"


def _entries() -> Iterator[Entry]:
    """The networks of the studies with the parameters that Tables 2 and 3 print, then those with arguments."""
    for name, model in PAPER_MODELS.items():
        printed = [
            study.as_printed("parameters", row.paper["parameters"])
            for study in (STUDIES["table3"], STUDIES["table2"])
            for row in study.rows
            if row.network == name
        ]
        if role := ROLES.get(re.split("[-/]", name)[0]):
            yield Entry(role, name, model, paper=next(iter(printed), ""), reason=REASONS.get(name, ""))
    yield Entry("transformer", "Transformer-Ti", "cit_tiny_patch16_224", {"token_names": ["conv"]})
    for name, model in (("ResNet-10", "resnet10_coadvised"), ("Mixer-Ti", "mixer_tiny_coadvised")):
        yield Entry(OTHER, f"{name}, one output", model, {"token_names": []})
        yield Entry(OTHER, f"{name}, separate heads", model)


ENTRIES = tuple(_entries())


def count(entry: Entry) -> tuple[int, int]:
    """The parameters, and the multiply-accumulates of one image."""
    model = on_meta(entry.create)
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
