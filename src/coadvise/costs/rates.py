"""How long a machine takes for what is counted: seconds a call, an operation and a byte of each kind."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from scipy.optimize import nnls

from coadvise.costs.count import Counted, Work

# Times weigh by this power of themselves: 1 fits small and large operations equally well by ratio, 0 only large ones.
POWER = 0.3


class Rate(NamedTuple):
    """Seconds of one kind of operation: for each call, each multiplication or addition, each byte read or written."""

    call: float = 0.0
    flop: float = 0.0
    byte: float = 0.0

    def seconds(self, work: Work) -> float:
        return sum(rate * amount for rate, amount in zip(self, work, strict=True))


@dataclass(frozen=True)
class Rates:
    """What a device attains in one precision.

    Attributes:
        kinds: by kind of operation; what is not in it takes as long as `kinds["elementwise and copies"]`.
        scale: by which the sum over operations is multiplied.
        issue: seconds to issue an operation.
        overlapped: the device computes while operations are issued, as a GPU does.
    """

    kinds: Mapping[str, Rate]
    issue: float
    scale: float = 1.0
    overlapped: bool = False

    def by_kind(self, counted: Counted) -> dict[str, float]:
        """Seconds of the device by kind of operation."""
        known = self.kinds
        other = known["elementwise and copies"]
        return {kind: self.scale * known.get(kind, other).seconds(work) for kind, work in counted.work.items()}

    def issuing(self, counted: Counted) -> float:
        return self.issue * counted.calls

    def seconds(self, counted: Counted) -> float:
        """Of a step's computation."""
        computing, issuing = sum(self.by_kind(counted).values()), self.issuing(counted)
        return max(computing, issuing) if self.overlapped else computing + issuing

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "kinds": {kind: list(rate) for kind, rate in self.kinds.items()}}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From what `plain` gave. Raises ValueError, TypeError or KeyError for anything else."""
        kinds = {str(kind): Rate(*map(float, rate)) for kind, rate in values["kinds"].items()}
        _ = kinds["elementwise and copies"]
        rest = float(values["issue"]), float(values["scale"])
        return cls(kinds, *rest, overlapped=bool(values["overlapped"]))


class Timed(NamedTuple):
    """A step that was measured: its seconds, what it did, and its single operations with their seconds."""

    seconds: float
    counted: Counted
    single: Sequence[tuple[str, Work, float]]


def fit(steps: Sequence[Timed], overlapped: bool) -> Rates:
    """The rates that explain measured steps best: first those of single operations, then of whole steps.

    Args:
        overlapped: see `Rates`. Times of single operations then hold a wait for the device, whose least is taken off.
    """
    single: dict[str, list[tuple[Work, float]]] = {}
    for step in steps:
        for kind, work, seconds in step.single:
            single.setdefault(kind, []).append((work, seconds))
    wait = min(seconds for _, _, seconds in steps[0].single) if overlapped else 0.0
    kinds = {kind: _rate([(work, seconds - wait) for work, seconds in found]) for kind, found in single.items()}
    if overlapped:
        issue = min(step.seconds / step.counted.calls for step in steps)
        scale = statistics.median(
            step.seconds / sum(Rates(kinds, issue).by_kind(step.counted).values())
            for step in steps
            if step.seconds > 2 * issue * step.counted.calls
        )
        return Rates(kinds, issue, scale, overlapped=True)
    bare = Rates(kinds, 0.0)
    rows = [(bare.seconds(step.counted), step.counted.calls) for step in steps]
    scale, issue = _least_squares(rows, [step.seconds for step in steps], power=1.0)
    return Rates(kinds, issue, scale)


def _rate(found: Iterable[tuple[Work, float]]) -> Rate:
    works, seconds = zip(*found, strict=True)
    return Rate(*_least_squares(works, seconds, POWER))


def _least_squares(rows: Sequence[Sequence[float]], seconds: Sequence[float], power: float) -> list[float]:
    """Rates >= 0, one a column, that explain the seconds."""
    matrix, times = np.array(rows, float), np.maximum(np.array(seconds), 1e-7)
    size, weight = matrix.max(0), times**-power
    size[size == 0] = 1
    found, _ = nnls(matrix / size * weight[:, None], times * weight)
    return (found / size).tolist()
