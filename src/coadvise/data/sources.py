"""Where images come from: a folder with splits, a folder of class folders, or the embedded handwritten digits."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from coadvise.config import RunConfig, nearest
from coadvise.data import draws
from coadvise.data.images import open_image
from coadvise.errors import UserError
from coadvise.machine import cache_folder, cache_path

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
VALIDATION_NAMES = ("val", "valid", "test")
SPLIT_NAMES = frozenset({*VALIDATION_NAMES, "train", "training", "validation", "testing", "eval"})
DIGITS = "digits"
DIGITS_TO_LEARN = 30  # of each class


@dataclass(frozen=True)
class Split:
    """Image files and their class indices, in a fixed order."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Source:
    """A labelled image set. `note` says how the split came about, for the user to read."""

    root: Path
    classes: tuple[str, ...]
    train: Split
    val: Split
    note: str

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the class folders are: one place, or one for each split."""
        train = self.root / "train"
        return (train, scored_folder(self.root)) if train.is_dir() else (self.root,)


def source_of(config: RunConfig) -> Source:
    """The images of a run, as `open_source` finds them."""
    return open_source(config.data.source, config.data.val_fraction, config.seed, config.data.classes)


def open_source(data: str | Path, val_fraction: float, seed: int, classes: Sequence[str] = ()) -> Source:
    """Finds classes and splits.

    Args:
        data: "digits"; a folder with train/ and one of val/, valid/, test/; or a folder of class folders.
        val_fraction: share of each class held out where the folder has no splits.
        seed: decides which images those are.
        classes: the class folders to use; all of them when empty.

    Raises:
        UserError: no such folder, no images, one class, a class in one split only, chosen classes that are not there.
    """
    root = _lay_out_digits() if str(data) == DIGITS else Path(data)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(
            f"data folder '{data}' {what}; give a folder of class folders, one with train/ and val/, or '{DIGITS}'"
        )
    val_name = _val_name(root)
    if not (root / "train").is_dir():
        source = _divide(root, val_fraction, seed, classes)
    elif val_name is None:
        raise UserError(
            f"'{root}' has train/ but none of val/, valid/, test/; add one, or give '{root / 'train'}' to split it"
        )
    else:
        source = _with_splits(root, val_name, classes)
    return replace(source, note=f"{source.note}; {len(classes)} chosen classes") if classes else source


def evaluation_split(data: str | Path, classes: Sequence[str], chosen: Sequence[str] = ()) -> Split:
    """The images to score a finished student on: the validation split of `data`, or all of a plain folder of classes.

    Args:
        classes: those that the student knows, in its order.
        chosen: the class folders to look at, which need not be all there; all of them when empty.

    Raises:
        UserError: the folder's classes are not the student's.
    """
    root = _lay_out_digits() if str(data) == DIGITS else Path(data)
    if not root.is_dir():
        raise UserError(f"data folder '{data}' does not exist; give a folder of class folders or one with val/")
    folder = scored_folder(root)
    found = [name for name in _class_names(folder) if name in chosen or not chosen]
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(f"'{folder}' has classes the student does not know: {few(unknown)}; it knows {few(classes)}")
    split = _list_split(folder, classes)
    if not split:
        raise UserError(f"'{folder}' holds no images of the student's classes ({few(classes)})")
    return split


def scored_folder(root: Path) -> Path:
    """Where the class folders of the images to score on are."""
    return root / (_val_name(root) or "")


def passed_over(folders: Sequence[Path], classes: Sequence[str]) -> list[str]:
    """What lies in class folders below `folders` and is no image by its name, in lines for the user to read."""
    lines = []
    if others := _other_files(folders, classes):
        lines.append(f"left out, no image by its name: {others}")
    names = sorted({name for folder in folders for name in _folder_names(folder)})
    if empty := [name for name in names if not any(_has_images(folder / name) for folder in folders)]:
        others = _other_files(folders, empty)
        lines.append(f"left out, without an image: class folder(s) {few(empty)}" + (f" ({others})" if others else ""))
    return lines


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves and, in the order of their names, the images below folders. Raises UserError for none."""
    found: list[Path] = []
    for path in paths:
        below = sorted(_images_below(path)) if path.is_dir() else [path]
        if not below:
            others = _other_files([path], ["."])
            raise UserError(
                f"'{path}' holds no image ({', '.join(sorted(EXTENSIONS))})" + (f", but {others}" if others else "")
            )
        found += below
    return found


def typical_size(root: Path, look_at: int = 100) -> int:
    """The median shorter side, in pixels, of the first images found below a folder; 0 where there are none."""
    sides = []
    for path in islice(_images_below(root), look_at):
        try:
            with open_image(path) as image:
                sides.append(min(image.size))
        except Exception:  # whatever is wrong with it, the scan names it
            continue
    return int(np.median(sides)) if sides else 0


def _with_splits(root: Path, val_name: str, classes: Sequence[str]) -> Source:
    train_classes = _chosen_names(root / "train", classes)
    val_classes = [name for name in _class_names(root / val_name) if name in classes or not classes]
    _at_least_two(root / "train", train_classes)
    for has, lacks, odd in (
        ("train", val_name, sorted(set(train_classes) - set(val_classes))),
        (val_name, "train", sorted(set(val_classes) - set(train_classes))),
    ):
        if odd:
            raise UserError(
                f"class folder(s) {few(odd)} are in '{root / has}' but not in '{root / lacks}'; both need the same"
            )
    train, val = _list_split(root / "train", train_classes), _list_split(root / val_name, train_classes)
    return Source(root, tuple(train_classes), train, val, f"trained on train/, scored on {val_name}/")


def _divide(root: Path, val_fraction: float, seed: int, chosen: Sequence[str]) -> Source:
    classes = _chosen_names(root, chosen)
    if classes and {name.lower() for name in classes} <= SPLIT_NAMES:
        raise UserError(
            f"'{root}' holds {few(classes)}, which look like splits, not classes; "
            f"name them train/ and one of {', '.join(f'{name}/' for name in VALIDATION_NAMES)}"
        )
    _at_least_two(root, classes)
    everything = _list_split(root, classes)
    labels = np.array(everything.labels)
    held_out = np.zeros(len(labels), bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(f"class '{name}' in '{root}' has one image; each class needs two or more to be split")
        count = min(max(1, round(val_fraction * len(members))), len(members) - 1)
        held_out[members[draws.permutation(seed, draws.SPLIT, label, len(members))[:count]]] = True

    def part(chosen: np.ndarray) -> Split:
        rows = np.flatnonzero(chosen)
        return Split(tuple(everything.paths[i] for i in rows), tuple(everything.labels[i] for i in rows))

    note = f"no splits in the folder: {val_fraction:.0%} of each class held out for validation, chosen by seed {seed}"
    return Source(root, tuple(classes), part(~held_out), part(held_out), note)


def _class_names(folder: Path) -> list[str]:
    """Sub-folders that hold at least one image file somewhere below."""
    return [name for name in _folder_names(folder) if _has_images(folder / name)]


def _folder_names(folder: Path) -> list[str]:
    # Path.is_dir answers no for a link that goes in a loop; os.DirEntry raises.
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())


def _chosen_names(folder: Path, chosen: Sequence[str]) -> list[str]:
    """The chosen classes in the order of their folders, which must all be there; all classes when none are chosen."""
    there = _class_names(folder)
    if missing := sorted(set(chosen) - set(there)):
        lacking = ", ".join(f"'{name}'{nearest(name, there)}" for name in missing[:5])
        raise UserError(
            f"'{folder}' has no images of {len(missing)} of the {len(chosen)} classes of data.classes: {lacking}"
            + (" and others" if len(missing) > 5 else "")
            + f"; its {len(there)} classes are {few(there)}; name some of them, or leave data.classes out to use all"
        )
    return [name for name in there if name in set(chosen)] if chosen else there


def _list_split(folder: Path, classes: Sequence[str]) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        below = sorted(_images_below(folder / name)) if (folder / name).is_dir() else []
        paths += below
        labels += [label] * len(below)
    return Split(tuple(paths), tuple(labels))


def _val_name(root: Path) -> str | None:
    """Which folder beside train/ is scored."""
    return next((name for name in VALIDATION_NAMES if (root / name).is_dir()), None)


def _has_images(folder: Path) -> bool:
    return next(_images_below(folder), None) is not None


def _images_below(folder: Path) -> Iterator[Path]:
    return (Path(parent, file) for parent, file, ending in _files_below(folder) if ending in EXTENSIONS)


def _files_below(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Each file's folder, name and ending; strings, since there may be millions."""
    # os.walk does not follow links, so a loop of links ends.
    for parent, folders, files in os.walk(folder, onerror=_cannot_list):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):  # which of them are looked at first is not the disk's to say
            if not file.startswith("."):
                yield parent, file, os.path.splitext(file)[1].lower()  # noqa: PTH122 - a Path takes three times as long


def _other_files(folders: Sequence[Path], names: Sequence[str]) -> str:
    """How many files below folders of these names have which other endings; nothing where all are images'."""
    below = (file for folder in folders for name in names for file in _files_below(folder / name))
    endings = Counter(ending or "without ending" for _, _, ending in below)
    most_first = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    others = {ending: count for ending, count in most_first if ending not in EXTENSIONS}
    shown = ", ".join(f"{count} {ending}" for ending, count in list(others.items())[:5])
    return shown + (" and others" if len(others) > 5 else "")


def _cannot_list(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"folder {str(error.filename)!r} cannot be listed: {error.strerror}; make it readable")


def _at_least_two(folder: Path, classes: Sequence[str]) -> None:
    if len(classes) > 1:
        return
    others = _other_files([folder], [name for name in _folder_names(folder) if name not in classes])
    convert = f"; its other folders hold {others}: convert what are images, to JPEG for example" if others else ""
    if not classes:
        raise UserError(
            f"'{folder}' holds no class folders with images ({', '.join(sorted(EXTENSIONS))}); "
            f"lay them out as {folder}/CLASS/IMAGE{convert}"
        )
    raise UserError(
        f"'{folder}' holds one class, '{classes[0]}'; at least two are needed, each in a folder of its own{convert}"
    )


def few(names: Sequence[str]) -> str:
    """The first five names for a message, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _lay_out_digits() -> Path:
    """Writes scikit-learn's 1,797 real 8x8 handwritten digits as images: 30 a class to train on, the rest to score.

    Raises:
        UserError: there is no folder to write them to.
    """
    path, name = cache_path(), f"digits-{DIGITS_TO_LEARN}"
    if path is not None and (path / name).is_dir():
        return path / name
    folder = cache_folder()
    if folder is None:
        raise UserError(
            f"the digits are written as images once, and '{path or '~/.cache/coadvise'}' cannot be written; set "
            "XDG_CACHE_HOME to a folder that can be"
        )
    root = folder / name
    from sklearn.datasets import load_digits  # here: it takes a second to import, and only this source needs it

    beside = Path(tempfile.mkdtemp(prefix=".digits-", dir=root.parent))
    digits = load_digits()
    seen = [0] * 10
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "train" if seen[label] < DIGITS_TO_LEARN else "test"
        seen[label] += 1
        folder = beside / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(folder / f"{number:04d}.png")
    try:
        beside.rename(root)
    except OSError:  # another process was faster
        shutil.rmtree(beside)
    return root
