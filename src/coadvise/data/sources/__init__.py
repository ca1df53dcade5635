"""Where labelled pictures come from: a folder, or a named source such as the handwritten digits.

To add a source, write a module with a `Split` of its own and a function that returns a `Source`, and list it in `NAMED`
or choose it in `open_source`. Nothing outside this package knows where the bytes of a picture are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coadvise.config import RunConfig
from coadvise.data.sources import digits, folder
from coadvise.data.sources.split import Source, Split, chosen_classes, few, known_classes, relabelled

__all__ = [
    "NAMED", "Source", "Split", "evaluation_remarks", "evaluation_split", "few", "open_source", "resolved", "source_of",
    "typical_size",
]  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A source that is given by its name in place of a folder, and the preset made for it."""

    open: Callable[[], Source]
    preset: str


NAMED = {"digits": Named(digits.open_digits, "digits")}


def source_of(config: RunConfig) -> Source:
    """The pictures of a run, as `open_source` finds them."""
    return open_source(config.data.source, config.data.val_fraction, config.seed, config.data.classes)


def open_source(data: str | Path, val_fraction: float, seed: int, classes: Sequence[str] = ()) -> Source:
    """Finds the classes and both splits.

    Args:
        data: a name in `NAMED`; a folder with train/ and one of val/, valid/, test/; or a folder of class folders.
        val_fraction: share of each class held out where the data have no splits.
        seed: decides which pictures are held out.
        classes: the classes to use; all of them when empty.

    Raises:
        UserError: no such folder, no pictures, one class, a class in one split only, chosen classes that do not exist.
    """
    if (named := NAMED.get(str(data))) is None:
        source = folder.open_folder(data, val_fraction, seed, classes, tuple(NAMED))
    else:
        source = named.open()
        if classes:
            kept = chosen_classes(source.where, source.classes, classes)
            train, val = (relabelled(split, source.classes, kept) for split in (source.train, source.val))
            source = replace(source, classes=tuple(kept), train=train, val=val)
    return replace(source, note=f"{source.note}; {len(classes)} chosen classes") if classes else source


def evaluation_split(data: str | Path, classes: Sequence[str], chosen: Sequence[str] = ()) -> Split:
    """The pictures to score a finished network on: the validation split of `data`, or all of a plain folder of classes.

    Args:
        classes: those that the network knows, in its order; labels are indices into it.
        chosen: the classes of `data` to use, of which some may be missing; all of them when empty.

    Raises:
        UserError: no such folder, a class that the network does not know, or no picture of its classes.
    """
    if (named := NAMED.get(str(data))) is None:
        return folder.evaluation_split(data, classes, chosen)
    source = named.open()
    return relabelled(source.val, source.classes, known_classes(source.where, source.classes, classes, chosen))


def evaluation_remarks(data: str | Path, classes: Sequence[str]) -> tuple[str, ...]:
    """What `evaluation_split` leaves out of `data`, in lines for the user."""
    return () if str(data) in NAMED else folder.evaluation_remarks(data, classes)


def typical_size(data: str | Path) -> int:
    """The median shorter side, in pixels, of the first pictures below a folder; 0 where there are none."""
    return folder.typical_size(Path(data))


def resolved(data: str | Path) -> str:
    """`data` as it can be given from any directory: an absolute path, or the name of a named source."""
    return str(data) if str(data) in NAMED else str(Path(data).resolve())
