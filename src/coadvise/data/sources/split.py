"""What a source of pictures gives: class names, labels, and the name and bytes of each picture by its index."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coadvise.config import nearest
from coadvise.errors import UserError

Labels = npt.NDArray[np.int64]


class Split(ABC):
    """Pictures in a fixed order.

    Attributes:
        labels: [N] int64, each picture's index into the source's classes.
    """

    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """What the user knows the picture by: unique in its source, text that can be written as UTF-8."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded picture. Raises OSError."""

    @abstractmethod
    def stamp(self, index: int) -> str:
        """Text that differs when the picture may have changed, found without reading it."""

    @abstractmethod
    def subset(self, rows: Sequence[int] | Labels, labels: Labels | None = None) -> "Split":
        """Some of the pictures, in the order of `rows`, with their labels, or others."""

    def names(self) -> list[str]:
        return [self.name(index) for index in range(len(self))]


@dataclass(frozen=True, eq=False)
class Source:
    """A labelled set of pictures with both splits.

    Attributes:
        where: what the user calls it: the folder as given, or the name of a named source.
        note: how the split came about.
        remarks: what was left out, a line each.
    """

    where: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    note: str
    remarks: tuple[str, ...] = ()


def relabelled(split: Split, own: Sequence[str], classes: Sequence[str]) -> Split:
    """The pictures of `classes`, in the order of these; labels become indices into `classes`.

    Args:
        own: the names of the split's present labels.
    """
    there = [own.index(name) if name in own else -1 for name in classes]
    rows = [np.flatnonzero(split.labels == label) for label in there]
    labels = np.repeat(np.arange(len(classes)), [len(part) for part in rows])
    return split.subset(np.concatenate(rows), labels)


def chosen_classes(where: object, existing: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The chosen classes in the order of the existing ones; all of these when none are chosen.

    Raises:
        UserError: a chosen class that does not exist, with the nearest that does.
    """
    if missing := sorted(set(chosen) - set(existing)):
        listed = ", ".join(f"'{name}'{nearest(name, list(existing))}" for name in missing[:5])
        raise UserError(
            f"'{where}' has no images of {len(missing)} of the {len(chosen)} classes of data.classes: {listed}"
            + (" and others" if len(missing) > 5 else "")
            + f"; its {len(existing)} classes are {few(existing)}; choose from these, or leave data.classes out to use "
            "all"
        )
    return [name for name in existing if name in set(chosen)] if chosen else list(existing)


def known_classes(
    where: object, existing: Sequence[str], classes: Sequence[str], chosen: Sequence[str]
) -> Sequence[str]:
    """`classes`, if a network of these can be scored on a source's. Raises UserError for one that it does not know."""
    used = [name for name in existing if name in chosen or not chosen]
    if unknown := sorted(set(used) - set(classes)):
        raise UserError(f"'{where}' has classes the student does not know: {few(unknown)}; it knows {few(classes)}")
    return classes


def few(names: Sequence[str]) -> str:
    """The first five names for a message, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
