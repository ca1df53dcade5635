"""Folders of labelled pictures: one with train/ and val/, or one of class folders that is divided here."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from coadvise.data import draws
from coadvise.data.images import open_image, read_file
from coadvise.data.sources.split import Labels, Source, Split, chosen_classes, few, known_classes
from coadvise.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
VALIDATION_NAMES = ("val", "valid", "test")
SPLIT_NAMES = frozenset({*VALIDATION_NAMES, "train", "training", "validation", "testing", "eval"})


@dataclass(frozen=True, eq=False)
class FolderSplit(Split):
    """Image files below a folder; `files` are relative to it."""

    root: Path
    files: tuple[str, ...]
    labels: Labels

    def name(self, index: int) -> str:
        return os.fsencode(self.files[index]).decode(errors="backslashreplace")

    def read(self, index: int) -> bytes:
        return read_file(self.root / self.files[index])

    def stamp(self, index: int) -> str:
        try:
            about = (self.root / self.files[index]).stat()
        except OSError as error:
            return f"errno {error.errno}"
        return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino} {about.st_mode}"

    def subset(self, rows: Sequence[int] | Labels, labels: Labels | None = None) -> "FolderSplit":
        labels = self.labels[np.asarray(rows, np.int64)] if labels is None else labels
        return FolderSplit(self.root, tuple(self.files[int(row)] for row in rows), labels)


def open_folder(
    data: str | Path, val_fraction: float, seed: int, classes: Sequence[str], names: Sequence[str]
) -> Source:
    """The source in a folder, as `sources.open_source`; `names` are what else `data` could be, for the error."""
    root = Path(data)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(
            f"data folder '{data}' {what}; give a folder of class folders, one with train/ and val/, or "
            + " or ".join(f"'{name}'" for name in names)
        )
    val_name = _val_name(root)
    if not (root / "train").is_dir():
        return _divided(root, val_fraction, seed, classes)
    if val_name is None:
        raise UserError(
            f"'{root}' has train/ but none of val/, valid/, test/; add one, or give '{root / 'train'}' to split it"
        )
    return _with_splits(root, val_name, classes)


def evaluation_split(data: str | Path, classes: Sequence[str], chosen: Sequence[str]) -> Split:
    """As `sources.evaluation_split`."""
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"data folder '{data}' does not exist; give a folder of class folders or one with val/")
    folder = root / (_val_name(root) or "")
    split = _Listing(root, [folder], known_classes(folder, _with_images(folder), classes, chosen)).splits[0]
    if not len(split):
        raise UserError(f"'{folder}' holds no images of the student's classes ({few(classes)})")
    return split


def evaluation_remarks(data: str | Path, classes: Sequence[str]) -> tuple[str, ...]:
    """As `sources.evaluation_remarks`."""
    root = Path(data)
    return _Listing(root, [root / (_val_name(root) or "")], classes).remarks


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves and, in the order of their names, the images below folders. Raises UserError for none."""
    found: list[Path] = []
    for path in paths:
        below = sorted(_images_below(path)) if path.is_dir() else [path]
        if not below:
            others = _other_files([path])
            raise UserError(
                f"'{path}' holds no image ({', '.join(sorted(EXTENSIONS))})" + (f", but {others}" if others else "")
            )
        found += below
    return found


def typical_size(root: Path, look_at: int = 100) -> int:
    """As `sources.typical_size`."""
    sides = []
    for path in islice(_images_below(root), look_at):
        try:
            with open_image(read_file(path)) as image:
                sides.append(min(image.size))
        except Exception:  # whatever is wrong with it, the scan names it
            continue
    return int(np.median(sides)) if sides else 0


class _Listing:
    """The pictures in the class folders below each of `folders`, in the order of `classes`, then of their paths.

    Attributes:
        splits: one for each of `folders`.
        remarks: what else is there, a line each.
    """

    def __init__(self, root: Path, folders: Sequence[Path], classes: Sequence[str]) -> None:
        endings: Counter[str] = Counter()
        self.splits = []
        for folder in folders:
            files: list[str] = []
            counts = []
            for name in classes:
                top = str(folder / name)
                prefix = str((folder / name).relative_to(root))
                below = list(_files_below(folder / name)) if (folder / name).is_dir() else []
                endings.update(ending for _, _, ending in below)
                images = [f"{prefix}{parent[len(top) :]}/{file}" for parent, file, end in below if end in EXTENSIONS]
                files += sorted(images, key=lambda path: path.split("/"))
                counts.append(len(images))
            self.splits.append(FolderSplit(root, tuple(files), np.repeat(np.arange(len(classes)), counts)))
        lines = [f"left out, no image by its name: {others}"] if (others := _shown(endings)) else []
        if empty := _without_images(folders):
            others = _other_files([folder / name for folder in folders for name in empty])
            lines.append(
                f"left out, without an image: class folder(s) {few(empty)}" + (f" ({others})" if others else "")
            )
        self.remarks = tuple(lines)


def _with_splits(root: Path, val_name: str, chosen: Sequence[str]) -> Source:
    folders = root / "train", root / val_name
    train_classes = chosen_classes(folders[0], _with_images(folders[0]), chosen)
    val_classes = [name for name in _with_images(folders[1]) if name in chosen or not chosen]
    _at_least_two(folders[0], train_classes)
    for has, lacks, odd in (
        (*folders, sorted(set(train_classes) - set(val_classes))),
        (*folders[::-1], sorted(set(val_classes) - set(train_classes))),
    ):
        if odd:
            raise UserError(f"class folder(s) {few(odd)} are in '{has}' but not in '{lacks}'; both need the same")
    listing = _Listing(root, folders, train_classes)
    train, val = listing.splits
    note = f"trained on train/, scored on {val_name}/"
    return Source(str(root), tuple(train_classes), train, val, note, listing.remarks)


def _divided(root: Path, val_fraction: float, seed: int, chosen: Sequence[str]) -> Source:
    classes = chosen_classes(root, _with_images(root), chosen)
    if classes and {name.lower() for name in classes} <= SPLIT_NAMES:
        raise UserError(
            f"'{root}' holds {few(classes)}, which look like splits, not classes; "
            f"name them train/ and one of {', '.join(f'{name}/' for name in VALIDATION_NAMES)}"
        )
    _at_least_two(root, classes)
    listing = _Listing(root, [root], classes)
    everything = listing.splits[0]
    held_out = np.zeros(len(everything), bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(everything.labels == label)
        if len(members) < 2:
            raise UserError(f"class '{name}' in '{root}' has one image; each class needs two or more to be split")
        count = min(max(1, round(val_fraction * len(members))), len(members) - 1)
        held_out[members[draws.permutation(seed, draws.SPLIT, label, len(members))[:count]]] = True
    train, val = (everything.subset(np.flatnonzero(rows)) for rows in (~held_out, held_out))
    note = f"no splits in the folder: {val_fraction:.0%} of each class held out for validation, chosen by seed {seed}"
    return Source(str(root), tuple(classes), train, val, note, listing.remarks)


def _with_images(folder: Path) -> list[str]:
    """Names of the folders in `folder` that hold at least one image file at any depth."""
    return [name for name in _folder_names(folder) if _has_images(folder / name)]


def _without_images(folders: Sequence[Path]) -> list[str]:
    """Names of folders that hold no image file in any of `folders`."""
    names = sorted({name for folder in folders for name in _folder_names(folder)})
    return [name for name in names if not any(_has_images(folder / name) for folder in folders)]


def _folder_names(folder: Path) -> list[str]:
    # Path.is_dir answers no for a link that goes in a loop; os.DirEntry raises.
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())


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
        for file in sorted(files):  # the same order on every disk
            if not file.startswith("."):
                yield parent, file, os.path.splitext(file)[1].lower()  # noqa: PTH122 - a Path takes three times as long


def _shown(endings: Counter[str]) -> str:
    """How many files have which endings other than those of images: "3 .heic, 1 .txt"; empty where there are none."""
    named = {ending or "without ending": count for ending, count in endings.items() if ending not in EXTENSIONS}
    others = [f"{count} {name}" for name, count in sorted(named.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(others[:5]) + (" and others" if len(others) > 5 else "")


def _other_files(folders: Iterable[Path]) -> str:
    """As `_shown`, of all files below some folders."""
    return _shown(Counter(ending for folder in folders for *_, ending in _files_below(folder)))


def _cannot_list(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"folder {str(error.filename)!r} cannot be listed: {error.strerror}; make it readable")


def _at_least_two(folder: Path, classes: Sequence[str]) -> None:
    if len(classes) > 1:
        return
    others = [folder / name for name in _folder_names(folder) if name not in classes]
    found = _other_files(others)
    convert = f"; its other folders hold {found}: convert those that are images, to JPEG for example" if found else ""
    if not classes:
        raise UserError(
            f"'{folder}' holds no class folders with images ({', '.join(sorted(EXTENSIONS))}); "
            f"lay them out as {folder}/CLASS/IMAGE{convert}"
        )
    raise UserError(
        f"'{folder}' holds one class, '{classes[0]}'; at least two are needed, each in a folder of its own{convert}"
    )
