"""Folders of labelled pictures: one with train/ and val/, or one of class folders that is divided here."""

import os
import struct
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np

from coadvise.config.schema import DataConfig
from coadvise.data.images import HEIF, open_file, read_file, typical_side
from coadvise.data.sources.names import GrowingNames, Names
from coadvise.data.sources.split import (
    TEST,
    TRAIN,
    USUAL_NAMES,
    VAL,
    Keys,
    Labels,
    Source,
    Split,
    chosen_classes,
    classes_of,
    divided,
    few,
    key,
    kind_of_split,
    known_classes,
    named_splits,
    split_note,
    used_classes,
    with_splits,
)
from coadvise.errors import UserError

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")  # read by sources/table.py
# What JPEG, PNG, GIF and TIFF files begin with, whatever they are called; "BM" also begins words.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
HEIF_EXTENSIONS = frozenset({".heic", ".heif"})
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
if HEIF:
    EXTENSIONS |= HEIF_EXTENSIONS


@dataclass(frozen=True, eq=False)
class FolderSplit(Split):
    """Image files below a folder.

    Attributes:
        files: their paths from `root`, as the file system has them.
        found: [N] uint64, `keys` of the time when the folder was listed; None to look again.
    """

    root: Path
    files: Names
    labels: Labels
    found: Keys | None = None

    @classmethod
    def of(cls, root: Path, files: Iterable[str], labels: Labels) -> "FolderSplit":
        """Files by their paths from `root`."""
        return cls(root, Names.of(map(os.fsencode, files)), labels)

    def name(self, index: int) -> str:
        return self.files[index].decode(errors="backslashreplace")

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.files[index])

    def read(self, index: int) -> bytes:
        with self.open(index) as file:
            return file.read()

    def open(self, index: int) -> BinaryIO:
        return open_file(os.path.join(os.fsencode(self.root), self.files[index]))  # noqa: PTH118 - quicker than a Path

    def stamp(self, index: int) -> str:
        return file_stamp(self.path(index)).hex()

    def keys(self) -> Keys:
        if self.found is not None:
            return self.found
        hashes = (key(self.files[index] + file_stamp(self.path(index))) for index in range(len(self)))
        return np.frombuffer(b"".join(hashes), "<u8")

    def subset(self, rows: Sequence[int] | Labels, labels: Labels | None = None) -> "FolderSplit":
        rows = np.asarray(rows, np.int64)
        labels = self.labels[rows] if labels is None else labels
        return FolderSplit(self.root, self.files.take(rows), labels, None if self.found is None else self.found[rows])


def file_stamp(file: Path | os.DirEntry[str]) -> bytes:
    """What differs when a file may have changed: size, times, inode, mode."""
    try:
        about = file.stat()
    except OSError as error:
        return struct.pack("<q", error.errno or 0)
    return struct.pack(
        "<5q", about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino & (2**63 - 1), about.st_mode
    )


def open_folder(root: Path, how: DataConfig, seed: int) -> Source:
    """The source in a folder, as `sources.open_source`."""
    splits = named_splits(root, _folder_names(root), how.splits)
    if TRAIN in splits and not _is_class(root, splits):
        if len(splits) == 1:
            raise UserError(
                f"'{root}' has {splits[TRAIN]}/ but none of {_usual(VAL, TEST)}; add one, give "
                f"'{root / splits[TRAIN]}' to divide it, or name the other with data.splits"
            )
        return _with_splits(root, splits, how)
    return _divided(root, how, seed)


def _is_class(root: Path, splits: Mapping[str, str]) -> bool:
    """Whether what is called like a training split is a class among others, such as trains: its images lie in it."""
    others = [name for name in with_images(root) if name not in splits.values()]
    return len(splits) == 1 and bool(others) and _flat_images(root / splits[TRAIN])


def evaluation_split(root: Path, classes: Sequence[str], how: DataConfig) -> Split:
    """As `sources.evaluation_split`."""
    folder = _scored_folder(root, how)
    used = used_classes(_class_names(folder, how), how.classes, how.exclude)
    known_classes(folder, used, classes)
    split = _Listing(root, [folder], used, classes, how).splits[0]
    if not len(split):
        raise UserError(f"'{folder}' holds no images of the student's classes ({few(classes)})")
    return split


def evaluation_remarks(root: Path, how: DataConfig) -> tuple[str, ...]:
    """As `sources.evaluation_remarks`."""
    folder = _scored_folder(root, how)
    used = used_classes(_class_names(folder, how), how.classes, how.exclude)
    return _Listing(root, [folder], used, classes_of(used), how).remarks


def _scored_folder(root: Path, how: DataConfig) -> Path:
    splits = named_splits(root, _folder_names(root), how.splits)
    return root / (splits.get(TEST) or splits.get(VAL) or "")


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


def image_paths(root: Path) -> list[str]:
    """All images below a folder, relative to it, in the order of their names."""
    skip = len(os.path.join(root, ""))  # noqa: PTH118 - a Path drops the last slash
    return sorted(entry.path[skip:] for entry in _files_below(root) if _is_image(entry))


def typical_size(root: Path, look_at: int = 100) -> int:
    """As `sources.typical_size`."""
    return typical_side(partial(read_file, path) for path in islice(_images_below(root), look_at))


class _Listing:
    """The pictures of the used classes below each of `folders`, in the order of `classes`, then of their paths.

    Attributes:
        splits: one for each of `folders`.
        remarks: what else is there, a line each.
    """

    def __init__(
        self, root: Path, folders: Sequence[Path], used: Mapping[str, str], classes: Sequence[str], how: DataConfig
    ) -> None:
        endings: Counter[str] = Counter()
        tops = {name.split("/")[0] for name in used}
        places = {name: number for number, name in enumerate(classes)}
        deepest: set[str] = set()
        self.splits = []
        for folder in folders:
            start = len(str(folder.relative_to(root)) + "/") if folder != root else 0
            label_of: dict[str, int | None] = {}  # by the folder that holds a picture, from `folder`
            names, labels, keys = GrowingNames(), array("q"), bytearray()
            for path, entry in _pictures(root, folder, tops):
                if not _is_image(entry):
                    endings[_ending(entry)] += 1
                    continue
                place = path.rpartition("/")[0][start:]
                if place not in label_of:
                    label_of[place] = places.get(used.get(_class_of(place, how), ""))
                if (label := label_of[place]) is not None:
                    name = os.fsencode(path)
                    names.append(name)
                    labels.append(label)
                    keys += key(name + file_stamp(entry))
            deepest.update(place for place, label in label_of.items() if label is not None)
            found = FolderSplit(root, names.names(), np.array(labels, np.int64), np.frombuffer(keys, "<u8"))
            order = np.argsort(found.labels, kind="stable")  # paths are sorted within a class
            self.splits.append(found if np.array_equal(order, np.arange(len(order))) else found.subset(order))
        lines = [f"left out, no image: {others}"] if (others := _shown(endings)) else []
        if empty := _without_images(folders):
            others = _other_files([folder / name for folder in folders for name in empty])
            lines.append(
                f"left out, without an image: class folder(s) {few(empty)}" + (f" ({others})" if others else "")
            )
        levels = max((place.count("/") + 1 for place in deepest), default=0)
        if isinstance(how.depth, int) and levels < how.depth:
            lines.append(f"data.depth={how.depth}, but folders are {levels} deep; those at the bottom are the classes")
        if how.depth in (None, "top") and len(deepest) > len(used):
            lines.append(
                f"{len(used)} top folders are the classes; {len(deepest)} folders below them hold the images, and "
                "data.depth=leaf makes each of these a class"
            )
        self.remarks = tuple(lines)


def _class_of(place: str, how: DataConfig) -> str:
    """The class of pictures by the folder that holds them, from their split."""
    if how.depth == "leaf":
        return place
    return "/".join(place.split("/")[: how.depth if isinstance(how.depth, int) else 1])


def _class_names(folder: Path, how: DataConfig) -> list[str]:
    if how.depth in (None, "top", 1):
        return with_images(folder)
    below = (path.rpartition("/")[0] for path, entry in _pictures(folder, folder, None) if _is_image(entry))
    return sorted({_class_of(place, how) for place in below})


def _pictures(root: Path, folder: Path, tops: Collection[str] | None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Each file below the (chosen) folders in a folder, with its path from `root`."""
    for name in _folder_names(folder) if tops is None else sorted(tops):
        top = folder / name
        if not top.is_dir():
            continue
        prefix, skip = str(top.relative_to(root)), len(str(top))
        for entry in _files_below(top):
            yield prefix + entry.path[skip:], entry


def _with_splits(root: Path, splits: Mapping[str, str], how: DataConfig) -> Source:
    folders = {kind: root / splits[kind] for kind in (TRAIN, VAL, TEST) if kind in splits}
    existing = sorted({name for folder in folders.values() for name in _class_names(folder, how)})
    used = chosen_classes(folders[TRAIN], existing, how.classes, how.exclude)
    _at_least_two(folders[TRAIN], classes_of(used), how)
    listing = _Listing(root, list(folders.values()), used, classes_of(used), how)
    parts = dict(zip(folders, listing.splits, strict=True))
    return with_splits(root, classes_of(used), parts, split_note(splits, "/"), listing.remarks)


def _divided(root: Path, how: DataConfig, seed: int) -> Source:
    existing = _class_names(root, how)
    if existing and all(kind_of_split(name) for name in existing):
        raise UserError(
            f"'{root}' holds {few(existing)}, which are splits, but none to train on; name one of them as "
            f"{_usual(TRAIN)}, or say which is which: data.splits={{train: ..., val: ...}}"
        )
    _refuse_parent(root, existing, how)
    used = chosen_classes(root, existing, how.classes, how.exclude)
    _at_least_two(root, classes_of(used), how)
    listing = _Listing(root, [root], used, classes_of(used), how)
    return divided(root, classes_of(used), listing.splits[0], how.val_fraction, seed, listing.remarks, "folder")


def _refuse_parent(root: Path, existing: Sequence[str], how: DataConfig) -> None:
    """Raises UserError for the parent of a data folder, given by mistake; an explicit `data.depth` is believed."""
    if how.depth is not None:
        return
    for name in existing:
        kinds = {kind_of_split(inner) for inner in _folder_names(root / name)}
        if TRAIN in kinds and kinds & {VAL, TEST}:
            raise UserError(f"'{root}' holds '{name}', which has splits of its own; give '{root / name}'")
    nested = [name for name in existing if len(with_images(root / name)) > 1 and not _flat_images(root / name)]
    if len(nested) == 1 and len(existing) > 1:
        inner = with_images(root / nested[0])
        raise UserError(
            f"'{root}' holds {few(existing)}, of which only '{nested[0]}' has folders of images inside, {len(inner)} "
            f"({few(inner)}); if those are the classes give '{root / nested[0]}', and if not data.depth=top"
        )


def _flat_images(folder: Path) -> bool:
    """Whether images lie directly in a folder."""
    with os.scandir(folder) as entries:
        return any(entry.is_file() and _is_image(entry) for entry in entries)


def _usual(*kinds: str) -> str:
    return ", ".join(f"{name}/" for kind in kinds for name in USUAL_NAMES[kind])


def with_images(folder: Path) -> list[str]:
    """Names of the folders in `folder` that hold at least one image file at any depth."""
    return [name for name in _folder_names(folder) if _has_images(folder / name)]


def _without_images(folders: Sequence[Path]) -> list[str]:
    """Names of folders that hold no image file in any of `folders`."""
    names = sorted({name for folder in folders for name in _folder_names(folder)})
    return [name for name in names if not any(_has_images(folder / name) for folder in folders)]


def _folder_names(folder: Path) -> list[str]:
    # Path.is_dir answers no for a link that goes in a loop; os.DirEntry raises.
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())


def _has_images(folder: Path) -> bool:
    return next(_images_below(folder), None) is not None


def _images_below(folder: Path) -> Iterator[Path]:
    return (Path(entry.path) for entry in _files_below(folder) if _is_image(entry))


def _ending(entry: os.DirEntry[str]) -> str:
    dot = entry.name.rfind(".")
    return entry.name[dot:].lower() if dot > 0 else ""


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By its ending, or else by its first bytes."""
    if _ending(entry) in EXTENSIONS:
        return True
    try:
        with open_file(Path(entry.path)) as opened:
            begin = opened.read(12)
    except OSError:
        return False
    return begin.startswith(SIGNATURES) or (begin[:4] == b"RIFF" and begin[8:] == b"WEBP")


def _files_below(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Files at any depth, in the order of their paths' parts. Linked folders stay out, so a loop of links ends."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if entry.name[0] != "."]
    except OSError as error:
        _cannot_list(error)
        return
    entries.sort(key=attrgetter("name"))  # nothing is slow here: there may be millions
    for entry in entries:
        if not _is_folder(entry):
            yield entry
        elif not entry.is_symlink():
            yield from _files_below(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that goes in a loop
        return False


def _shown(endings: Counter[str]) -> str:
    """How many files have which endings: "3 .heic, 1 .txt"; empty where there are none."""
    named = {ending or "without ending": count for ending, count in endings.items()}
    others = [f"{count} {name}" for name, count in sorted(named.items(), key=lambda item: (-item[1], item[0]))]
    text = ", ".join(others[:5]) + (" and others" if len(others) > 5 else "")
    return text + ("; .heic needs the extra heic: pip install 'coadvise[heic]'" if HEIF_EXTENSIONS & {*endings} else "")


def _other_files(folders: Iterable[Path]) -> str:
    """As `_shown`, of all files below some folders."""
    files = (found for folder in folders for found in _files_below(folder))
    return _shown(Counter(_ending(entry) for entry in files if not _is_image(entry)))


def _cannot_list(error: OSError) -> None:
    if isinstance(error, NotADirectoryError):
        raise UserError(f"{str(error.filename)!r} is a file; give a folder of class folders, or a table")
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"folder {str(error.filename)!r} cannot be listed: {error.strerror}; make it readable")


def _at_least_two(folder: Path, classes: Sequence[str], how: DataConfig) -> None:
    if len(classes) > 1:
        return
    if tables := sorted(path.name for path in folder.iterdir() if path.suffix.lower() in TABLE_ENDINGS):
        raise UserError(f"'{folder}' has no class folders, but a table: give '{folder / tables[0]}'")
    others = [folder / name for name in _folder_names(folder) if name not in classes]
    found = _other_files(others)
    advice = f"; its other folders hold {found}: convert those that are images, to JPEG for example" if found else ""
    if not classes:
        if _flat_images(folder) and len(with_images(folder.parent)) > 1:
            raise UserError(f"'{folder}' holds images and no class folders; if it is a class, give '{folder.parent}'")
        raise UserError(
            f"'{folder}' holds no class folders with images ({', '.join(sorted(EXTENSIONS))}); "
            f"lay them out as {folder}/CLASS/IMAGE{advice}"
        )
    if how.classes or how.exclude:
        raise UserError(
            f"data.classes and data.exclude leave one class of '{folder}', '{classes[0]}'; at least two are needed"
        )
    inner = with_images(folder / classes[0])
    if len(inner) > 1:
        advice = f"; '{folder / classes[0]}' has {len(inner)} ({few(inner)}): give that folder"
    raise UserError(
        f"'{folder}' holds one class, '{classes[0]}'"
        + (f", at data.depth={how.depth}" if how.depth else "")
        + f"; at least two are needed, each in a folder of its own{advice}"
    )
