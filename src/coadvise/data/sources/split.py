"""What a source of pictures gives: class names, labels, and the name and bytes of each picture by its index."""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from coadvise.config.reading import nearest
from coadvise.config.schema import Classes
from coadvise.data import draws
from coadvise.errors import UserError

Labels = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

TRAIN, VAL, TEST = "train", "val", "test"
USUAL_NAMES = {  # of splits, in any case
    TRAIN: ("train", "training"),
    VAL: ("val", "valid", "validation", "dev"),
    TEST: ("test", "testing", "eval"),
}


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

    def open(self, index: int) -> BinaryIO:
        """The encoded picture as a file, of which only a part may be read. Raises OSError."""
        return io.BytesIO(self.read(index))

    @abstractmethod
    def stamp(self, index: int) -> str:
        """Text that differs when the picture may have changed, found without reading it."""

    @abstractmethod
    def subset(self, rows: Sequence[int] | Labels, labels: Labels | None = None) -> "Split":
        """Some of the pictures, in the order of `rows`, with their labels, or others."""

    def facts(self, rows: Labels) -> npt.NDArray[np.void] | None:
        """What is known of some pictures without reading them: the fields of `store.Seen`, a width of 0 for unknown."""
        return None

    def windows(self) -> tuple[Labels, int] | None:
        """Where pictures are best read shard by shard: each picture's shard, and how many are shuffled together."""
        return None

    def bring(self, rows: Labels, beat: Callable[[], None]) -> None:  # noqa: B027
        """Fetches what holds some pictures that are read next, if they are elsewhere. Calls `beat` while it works."""

    def bring_soon(self, rows: Labels) -> None:  # noqa: B027
        """The same in the background, for pictures that are read later."""

    def names(self) -> list[str]:
        return [self.name(index) for index in range(len(self))]

    def keys(self) -> Keys:
        """[N] uint64, hashes of each picture's name and stamp."""
        about = (f"{self.name(index)}\0{self.stamp(index)}".encode() for index in range(len(self)))
        return np.frombuffer(b"".join(map(key, about)), "<u8")


def evenly(count: int, most: int | None) -> list[int]:
    """At most this many numbers of 0..count-1, evenly spread: pictures are in the order of their classes."""
    few = count if most is None else min(most, count)
    return np.linspace(0, count, few, endpoint=False).astype(int).tolist()


def few_a_class(labels: Labels, most: int, seed: int) -> Labels:
    """The rows of at most `most` pictures of each class, in their order; those of a smaller number are among them."""
    order = draws.permutation(seed, draws.FEW, 0, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_class[rank < most])


def key(about: bytes) -> bytes:
    """A hash of 8 bytes: among a million pictures, two have the same by a chance of one in ten million."""
    return hashlib.blake2b(about, digest_size=8).digest()


@dataclass(frozen=True, eq=False)
class Source:
    """A labelled set of pictures with its splits.

    Attributes:
        where: what the user calls it: the folder or table as given, or the name of a named source.
        note: how the splits came about.
        remarks: what was left out or needs attention, a line each.
        test: where there are three splits: the one that finished networks are scored on. Learning curves are of `val`.
    """

    where: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    note: str
    remarks: tuple[str, ...] = ()
    test: Split | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """By name, in order."""
        return {TRAIN: self.train, VAL: self.val} | ({} if self.test is None else {TEST: self.test})

    @property
    def scored(self) -> Split:
        """What finished networks are scored on."""
        return self.val if self.test is None else self.test


def kind_of_split(name: str) -> str | None:
    """Which split a folder or a value of a table is by its name; None if it has none of the usual names."""
    return next((kind for kind, names in USUAL_NAMES.items() if name.strip().lower() in names), None)


def named_splits(where: object, there: Sequence[str], given: Mapping[Any, str]) -> dict[str, str]:
    """Which of the names that are there is which split.

    Args:
        given: `data.splits`; empty to go by the usual names.

    Raises:
        UserError: a given name that is not there or given twice, none to train or to score on, or two names for one
            split.
    """
    for kind, name in given.items():
        if name not in there:
            raise UserError(
                f"data.splits.{kind}={name}: '{where}' has none of that name{nearest(name, list(there))}; there are "
                f"{few(there)}"
            )
    if given and (TRAIN not in given or len({*given.values()}) < max(2, len(given))):
        said = ", ".join(f"{kind}: {name}" for kind, name in given.items())
        raise UserError(
            f"data.splits={{{said}}} must name one split to train on and another to score on, as {{train: ..., val: "
            f"...}}; '{where}' has {few(there)}"
        )
    if given:
        return dict(given)
    found: dict[str, str] = {}
    for name in there:
        if (kind := kind_of_split(name)) is None:
            continue
        if kind in found:
            raise UserError(
                f"'{where}' has both '{found[kind]}' and '{name}'; say which to use, such as data.splits={{train: ..., "
                f"{kind if kind != TRAIN else VAL}: ...}}"
            )
        found[kind] = name
    return found


def split_note(splits: Mapping[str, str], ending: str = "") -> str:
    """How given splits are used, for the user."""
    train, scored = splits[TRAIN], splits.get(TEST) or splits[VAL]
    note = f"trained on {train}{ending}, scored on {scored}{ending}"
    return note + (f", learning curves on {splits[VAL]}{ending}" if TEST in splits and VAL in splits else "")


def relabelled(split: Split, own: Sequence[str | None], classes: Sequence[str]) -> Split:
    """The pictures of `classes`, in the order of these; labels become indices into `classes`.

    Args:
        own: the names of the split's present labels; None for one to leave out. Several may have the same name.
    """
    names = np.array([classes.index(name) if name in classes else -1 for name in own], np.int64)
    labels = names[split.labels]
    rows = np.argsort(labels, kind="stable")
    rows = rows[labels[rows] >= 0]
    return split.subset(rows, labels[rows])


def chosen_classes(
    where: object, existing: Sequence[str], chosen: Classes, exclude: Collection[str] = ()
) -> dict[str, str]:
    """What each existing class that is used is called; `classes_of` gives the names in order.

    Raises:
        UserError: a class that is chosen or excluded does not exist, with the nearest that does.
    """
    names = new_names(chosen)
    for key, wanted in (("classes", names), ("exclude", exclude)):
        if missing := sorted(set(wanted) - set(existing)):
            listed = ", ".join(f"'{name}'{nearest(name, list(existing))}" for name in missing[:5])
            raise UserError(
                f"data.{key} names {len(missing)} class(es) without an image in '{where}': {listed}"
                + (" and others" if len(missing) > 5 else "")
                + f"; its classes are {few(existing)}; choose from these, or leave data.{key} out"
            )
    return used_classes(existing, chosen, exclude)


def new_names(chosen: Classes) -> dict[str, str]:
    """The name that `data.classes` gives each class that it lists."""
    if isinstance(chosen, dict):
        return {old: new for new, olds in chosen.items() for old in olds}
    return {name: name for name in chosen}


def used_classes(existing: Sequence[str], chosen: Classes, exclude: Collection[str] = ()) -> dict[str, str]:
    """As `chosen_classes`, where some of the chosen ones may be missing."""
    names = new_names(chosen)
    return {old: names.get(old, old) for old in existing if old not in exclude and (old in names or not names)}


def classes_of(used: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(set(used.values())))


def known_classes(where: object, used: Mapping[str, str], classes: Sequence[str]) -> None:
    """Raises UserError for a class of a source that a network of `classes` does not know."""
    if unknown := sorted(set(used.values()) - set(classes)):
        raise UserError(f"'{where}' has classes the student does not know: {few(unknown)}; it knows {few(classes)}")


def with_splits(
    where: object, classes: Sequence[str], parts: Mapping[str, Split], note: str, remarks: Sequence[str]
) -> Source:
    """A source of given splits, "train" and at least one other.

    Raises:
        UserError: a class without an image to train on, or nothing to score on.
    """
    train, scored = parts[TRAIN], [kind for kind in (VAL, TEST) if kind in parts]
    there = {kind: set(np.unique(part.labels).tolist()) for kind, part in parts.items()}
    lines = list(remarks)
    for kind in scored:
        odd = [classes[label] for label in sorted(there[kind] - there[TRAIN])]
        if odd:
            alike = nearest(odd[0], [classes[label] for label in there[TRAIN]])
            raise UserError(
                f"'{where}': no image of {few(odd)} to train on, but some in {kind}{alike}; add images, or leave the "
                f"class out with data.exclude{_also(remarks)}"
            )
        if not len(parts[kind]):
            raise UserError(
                f"'{where}': the {kind} split has no images of the classes {few(classes)}; add some, or say by "
                f"data.splits which is which{_also(remarks)}"
            )
        if lacking := [name for label, name in enumerate(classes) if label not in there[kind]]:
            lines.append(f"warning: {kind} has no image of {few(lacking)}; nothing is measured of that there")
    val = parts[scored[0]]
    return Source(str(where), tuple(classes), train, val, note, tuple(lines), parts[TEST] if len(scored) > 1 else None)


def divided(
    where: object,
    classes: Sequence[str],
    everything: Split,
    val_fraction: float,
    seed: int,
    remarks: Sequence[str],
    what: str,
) -> Source:
    """A source whose pictures are divided here, class by class. Raises UserError for a class of one picture."""
    counts = np.bincount(everything.labels, minlength=len(classes))
    if lone := [name for name, count in zip(classes, counts, strict=True) if count < 2]:
        raise UserError(
            f"'{where}': {len(lone)} of its {len(classes)} classes have one image, {few(lone)}; each needs two or more "
            f"to be split; add some, or leave them out with data.exclude{_also(remarks)}"
        )
    held_out = np.zeros(len(everything), bool)
    for label in range(len(classes)):
        members = np.flatnonzero(everything.labels == label)
        count = min(max(1, round(val_fraction * len(members))), len(members) - 1)
        held_out[members[draws.permutation(seed, draws.SPLIT, label, len(members))[:count]]] = True
    train, val = (everything.subset(np.flatnonzero(rows)) for rows in (~held_out, held_out))
    note = f"no splits in the {what}: {val_fraction:.0%} of each class held out for validation, chosen by seed {seed}"
    return Source(str(where), tuple(classes), train, val, note, tuple(remarks))


def _also(remarks: Sequence[str]) -> str:
    """What was left out, since that may be the reason."""
    return "".join(f"; {line}" for line in remarks if line.startswith("left out"))


def few(names: Collection[str]) -> str:
    """The first five names for a message, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in list(names)[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
