"""What a training step does, counted without computing it: its operations by kind, and the most memory it holds.

The step runs on fake tensors, so autocast, autograd and the optimiser issue the operations that they issue in training.
Multiplications and additions are PyTorch's own formulas (`torch.utils.flop_counter`; that of involution is in
`ops/involution.py`), bytes those of the tensors that an operation reads and writes.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from coadvise.config.schema import ImageSize, sides
from coadvise.costs.step import LAYOUT, TrainingStep, materialise
from coadvise.ops.batch_norm import switched_off

PRODUCT, CONVOLUTION, GROUPED, INVOLUTION, ATTENTION, NORM, UPDATE, OTHER = KINDS = (
    "products", "convolutions", "grouped convolutions", "involutions", "attention", "norms", "updates",
    "elementwise and copies",
)  # fmt: skip
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_SILENT = ("prim", "profiler")  # namespaces of operations that take no time
_UNWRITTEN = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class Work(NamedTuple):
    """Of operations of one kind: how many, their multiplications and additions, the bytes they read and write."""

    calls: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def plus(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Counted:
    """A step.

    Attributes:
        work: by kind.
        calls: operations issued, also those that only make a view of a tensor.
        peak: the most bytes held at any moment.
        kept: those that stay from step to step.
        gradients, buffers: bytes that processes exchange; see `TrainingStep`.
    """

    work: dict[str, Work]
    calls: float
    peak: float
    kept: float
    gradients: float
    buffers: float


def count(
    step: Callable[[], TrainingStep], batches: Sequence[int], size: ImageSize, micro_batches: int = 1, gpu: bool = False
) -> list[Counted]:
    """Counts a step with each of some numbers of images in a micro-batch on one process.

    Args:
        step: makes it, under the mode of fake tensors, so that its networks' tensors are to be made there
            (`materialise`).
        size: of the images, pixels.
        gpu: whether it is to run on one, where kernels that are for CPUs alone do not.
    """
    with FakeTensorMode(), switched_off(gpu), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # in copying averaged weights
        taken = step()
        if taken.averaged is not None:
            materialise(taken.averaged.module)  # the copy is of another mode

        def tally(images: int, times: int) -> Tally:
            batch = torch.empty(images, 3, *sides(size)).to(memory_format=LAYOUT)
            with Tally(held=taken.kept + batch.nbytes) as found:
                taken(batch, times)
            return found

        tally(batches[0], 1)  # makes the optimiser's averages
        few = range(1, min(micro_batches, 2) + 1)
        return [_extended([tally(images, times) for times in few], micro_batches, taken) for images in batches]


def _extended(tallies: "Sequence[Tally]", micro_batches: int, step: TrainingStep) -> Counted:
    """A step of some micro-batches, from one with a single one and, if it has more, one with two."""
    first, last = tallies[0], tallies[-1]
    more = max(0, micro_batches - 2)

    def grown(one: float, two: float) -> float:
        return two + more * (two - one)

    work = {kind: Work(*map(grown, first.work.get(kind, Work()), last.work[kind])) for kind in last.work}
    calls = grown(first.calls, last.calls)
    return Counted(work, calls, last.peak, step.kept, step.gradients, step.buffers)


class Tally(TorchDispatchMode):
    """Counts the operations that are issued while it is on.

    Args:
        clock: takes the seconds of each operation, in `single`, with what it does; None for fake tensors.
        held: bytes held at the beginning.
    """

    def __init__(self, clock: Callable[[], float] | None = None, held: float = 0.0) -> None:
        super().__init__()
        self.clock, self.held, self.peak = clock, held, held
        self.work: dict[str, Work] = {}
        self.single: list[tuple[str, Work, float]] = []
        self.calls = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, clock = kwargs or {}, self.clock
        began = clock() if clock else 0.0
        out = func(*args, **kwargs)
        seconds = clock() - began if clock else 0.0
        if func.namespace in _SILENT:
            return out
        self.calls += 1
        name = func.overloadpacket.__name__
        made = _tensors(out)
        if clock is None:
            self._hold(made)
        if not func.is_view and name not in _UNWRITTEN:
            work = Work(1, _flops(func, args, kwargs, out), _bytes(_tensors((args, kwargs))) + _bytes(made))
            kind = _kind(name, args)
            self.work[kind] = self.work.get(kind, Work()).plus(work)
            if clock:
                self.single.append((kind, work, seconds))
        return out

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        """Counts memory until nothing uses it any more."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage not in self._known:
                self._known.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)

    def _free(self, size: int) -> None:
        self.held -= size


def _kind(name: str, args: Any) -> str:
    if name in ("convolution", "convolution_backward"):
        x, weight = args[1:3] if name == "convolution_backward" else args[:2]
        return CONVOLUTION if x.shape[1] == weight.shape[1] else GROUPED
    if name.startswith("involution2d"):
        return INVOLUTION
    if "scaled_dot_product" in name:
        return ATTENTION
    if name.startswith(("_fused", "_foreach")):  # of the optimiser, the gradient's norm and the averaged weights
        return UPDATE
    if "_norm" in name and ("native" in name or name.startswith("batch_norm_relu")):
        return NORM
    return PRODUCT if name in _PRODUCTS else OTHER


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    name = func.overloadpacket.__name__
    if "scaled_dot_product" in name:  # PyTorch has no formula for the CPU's; [B, H, N, D], two products, five backward
        backward = name.endswith("backward")
        query, key = args[1:3] if backward else args[:2]
        return (10.0 if backward else 4.0) * query.numel() * key.shape[-2]
    formula = flop_registry.get(func.overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
