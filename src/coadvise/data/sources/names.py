"""Millions of names in three arrays: no object each, so loader processes share them without copying."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Names:
    """Byte strings.

    Attributes:
        text: uint8, all of them one after the other; subsets share it.
        starts: [N] int64, where each begins in `text`.
        lengths: [N] int32, bytes.
    """

    text: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Names":
        growing = GrowingNames()
        for name in names:
            growing.append(name)
        return growing.names()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:
        start = self.starts[index]
        return self.text[start : start + self.lengths[index]].tobytes()

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> "Names":
        """Some of them, in the order of `rows`."""
        return Names(self.text, self.starts[rows], self.lengths[rows])


class GrowingNames:
    """Names that are appended one by one; no object is kept for each."""

    def __init__(self) -> None:
        self._text, self._lengths = bytearray(), array("i")

    def append(self, name: bytes) -> None:
        self._text += name
        self._lengths.append(len(name))

    def names(self) -> Names:
        """All of them; nothing can be appended afterwards."""
        lengths = np.array(self._lengths, np.int32)
        return Names(
            np.frombuffer(self._text or b"\0", np.uint8), np.cumsum(lengths, dtype=np.int64) - lengths, lengths
        )
