"""GPUs by name, with the figures of their data sheets. None of them has been measured by this project.

What a training attains of such figures is assumed, one share for all. A calibration that was made on such a machine
(`coadvise plan --calibrate` there) takes the place of the assumption.
"""

import re
from dataclasses import dataclass
from functools import partial

from coadvise.config.reading import nearest
from coadvise.costs.count import ATTENTION, CONVOLUTION, KINDS, PRODUCT
from coadvise.costs.rates import Rate, Rates
from coadvise.errors import UserError

SHARE = 0.5  # of the arithmetic of a data sheet that products and convolutions attain; assumed
BANDWIDTH_SHARE = 0.75  # of its bandwidth; assumed
ISSUE = 8e-6  # seconds to issue an operation from Python; assumed
_ARITHMETIC = (PRODUCT, CONVOLUTION, ATTENTION)
_WORDS = r"nvidia|geforce|tesla|quadro|tensor|core|gpu|sxm\d*|hbm\d*\w?|pcie|nvl|rtx|[^a-z0-9]+"


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        memory: bytes.
        bandwidth: of its memory, bytes a second.
        half, single: multiplications and additions a second, dense, in bfloat16 (0: it has none) and float32.
        link: bytes a second that one GPU sends to another of its node, in one direction.
    """

    name: str
    memory: float
    bandwidth: float
    half: float
    single: float
    link: float
    share: float = SHARE

    def rates(self, half: bool) -> Rates:
        """What it is assumed to attain. Raises UserError for bfloat16 on a GPU that has none."""
        if half and not self.half:
            raise UserError(f"{self.name} has no bfloat16; give engine.precision=float32, or auto")
        flop, byte = 1 / (self.share * (self.half if half else self.single)), 1 / (BANDWIDTH_SHARE * self.bandwidth)
        kinds = {kind: Rate(0.0, flop, 0.0) if kind in _ARITHMETIC else Rate(0.0, 0.0, byte) for kind in KINDS}
        return Rates(kinds, ISSUE, overlapped=True)


def _gpu(name: str, gb: float, gb_s: float, half: float, single: float, link: float) -> Gpu:
    return Gpu(name, gb * 1e9, gb_s * 1e9, half * 1e12, single * 1e12, link * 1e9)


PCIE3, PCIE4 = 16.0, 32.0  # GB/s in one direction, sixteen lanes
GPUS = (
    _gpu("H100", 80, 3350, 989, 67, 450),
    _gpu("H200", 141, 4800, 989, 67, 450),
    _gpu("A100 40 GB", 40, 1555, 312, 19.5, 300),
    _gpu("A100 80 GB", 80, 2039, 312, 19.5, 300),
    _gpu("A10", 24, 600, 125, 31.2, PCIE4),
    _gpu("L4", 24, 300, 121, 30.3, PCIE4),
    _gpu("T4", 16, 320, 0, 8.1, PCIE3),  # neither it nor the V100 has bfloat16
    _gpu("V100 32 GB", 32, 900, 0, 15.7, 150),
    _gpu("RTX 4090", 24, 1008, 165, 82.6, PCIE4),
    _gpu("RTX 3090", 24, 936, 71, 35.6, PCIE4),
)


def gpu_named(name: str) -> Gpu:
    """A GPU by its name in any case, also as PyTorch gives it. Raises UserError for an unknown one."""
    given = _plain(name)
    if (same := [gpu for gpu in GPUS if _plain(gpu.name) == given]) or (same := [*filter(partial(_fits, given), GPUS)]):
        return same[0]
    names = [gpu.name for gpu in GPUS]
    raise UserError(
        f"unknown GPU '{name}'{nearest(name.upper(), names)}; there are {', '.join(names)}, or give its figures: "
        "--gpu-tflops, --gpu-memory (GB) and --gpu-bandwidth (GB/s)"
    )


def _fits(given: str, gpu: Gpu) -> bool:
    """Whether a name differs from a GPU's by its memory alone, which one of them leaves out."""
    name = _plain(gpu.name)
    longer, shorter = max(given, name, key=len), min(given, name, key=len)
    return bool(given) and re.fullmatch(re.escape(shorter) + r"[1-9]\d{1,2}gb", longer) is not None


def gpu_of(name: str, tflops: float, memory: float, bandwidth: float) -> Gpu:
    """A GPU by its figures: dense TFLOP/s in the precision of training, GB, GB/s. Its links are those of PCIe 4."""
    return _gpu(name, memory, bandwidth, tflops, tflops, PCIE4)


def _plain(name: str) -> str:
    return re.sub(_WORDS, "", name.lower())
