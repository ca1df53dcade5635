"""Millions of names in three arrays: no object each, so loader processes share them without copying."""

from collections.abc import Iterable, Iterator, Sequence
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
        """Keeps no list of them meanwhile."""
        text = bytearray()

        def lengths() -> Iterator[int]:
            for name in names:
                text.extend(name)
                yield len(name)

        sizes = np.fromiter(lengths(), np.int32)
        return cls(np.frombuffer(text or b"\0", np.uint8), np.cumsum(sizes, dtype=np.int64) - sizes, sizes)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:
        start = self.starts[index]
        return self.text[start : start + self.lengths[index]].tobytes()

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> "Names":
        """Some of them, in the order of `rows`."""
        return Names(self.text, self.starts[rows], self.lengths[rows])
