"""Lets torchvision be imported beside a PyTorch build that its compiled part does not match.

The CPU wheels named in constraints/cpu.txt are such a pair: torchvision's own library does not load, and its import
then fails with "operator torchvision::nms does not exist", because it attaches shape functions to operators that nobody
defined. Nothing here calls those operators, so defining their schemas is enough. Where the compiled part loads, nothing
is done. Import this module before torchvision or timm.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # must stay alive: the schemas go with it


def _compiled_part_loads(package: Path) -> bool:
    for path in sorted(package.glob("_C*.so")) + sorted(package.glob("_C*.pyd")):
        try:
            torch.ops.load_library(path)
        except OSError:
            return False
        return True
    return False


def guard() -> None:
    """Defines the schemas of torchvision's `nms` and `qnms` where its compiled part cannot."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return
    if not _compiled_part_loads(Path(spec.origin).parent):
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)


guard()
