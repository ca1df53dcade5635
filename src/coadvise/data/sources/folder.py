"""Folders of labelled pictures: one with train/ and val/, or one of class folders that is divided here."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from coadvise.config import DataConfig
from coadvise.data.images import HEIF, open_image, read_file
from coadvise.data.sources.split import (
    TEST,
    TRAIN,
    USUAL_NAMES,
    VAL,
    Labels,
    Source,
    Split,
    chosen_classes,
    classes_of,
    divided,
    few,
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


def open_folder(root: Path, how: DataConfig, seed: int) -> Source:
    """The source in a folder, as `sources.open_source`."""
    splits = named_splits(root, _folder_names(root), how.splits)
    if TRAIN in splits:
        if len(splits) == 1:
            raise UserError(
                f"'{root}' has {splits[TRAIN]}/ but none of {_usual(VAL, TEST)}; add one, give "
                f"'{root / splits[TRAIN]}' to divide it, or name the other with data.splits"
            )
        return _with_splits(root, splits, how)
    return _divided(root, how, seed)


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
    skip = len(str(root)) + 1
    below = (f"{parent}/{file}"[skip:] for parent, file, end in _files_below(root) if _is_image(parent, file, end))
    return sorted(below)


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
        deepest: set[str] = set()
        self.splits = []
        for folder in folders:
            of_class: dict[str, list[str]] = {name: [] for name in classes}
            start = len(str(folder.relative_to(root)) + "/") if folder != root else 0
            for path, ending, is_image in _pictures(root, folder, tops):
                if not is_image:
                    endings[ending] += 1
                elif (name := used.get(_class_of(path[start:], how))) is not None:
                    of_class[name].append(path)
                    deepest.add(path[start:].rpartition("/")[0])
            files = [path for name in classes for path in sorted(of_class[name], key=lambda path: path.split("/"))]
            counts = [len(of_class[name]) for name in classes]
            self.splits.append(FolderSplit(root, tuple(files), np.repeat(np.arange(len(classes)), counts)))
        lines = [f"left out, no image: {others}"] if (others := _shown(endings)) else []
        if empty := _without_images(folders):
            others = _other_files([folder / name for folder in folders for name in empty])
            lines.append(
                f"left out, without an image: class folder(s) {few(empty)}" + (f" ({others})" if others else "")
            )
        if how.depth in (None, "top") and len(deepest) > len(used):
            lines.append(
                f"{len(used)} top folders are the classes; {len(deepest)} folders below them hold the images, and "
                "data.depth=leaf makes each of these a class"
            )
        self.remarks = tuple(lines)


def _class_of(path: str, how: DataConfig) -> str:
    """The class of a picture by its path within a split."""
    folders = path.split("/")[:-1]
    if how.depth == "leaf":
        return "/".join(folders)
    return "/".join(folders[: how.depth if isinstance(how.depth, int) else 1])


def _class_names(folder: Path, how: DataConfig) -> list[str]:
    if how.depth in (None, "top", 1):
        return with_images(folder)
    found = {_class_of(path, how) for path, _, is_image in _pictures(folder, folder, None) if is_image}
    return sorted(found)


def _pictures(root: Path, folder: Path, tops: Collection[str] | None) -> Iterator[tuple[str, str, bool]]:
    """Of each file below the (chosen) folders in a folder: its path from `root`, its ending, whether it is an image."""
    for name in _folder_names(folder) if tops is None else sorted(tops):
        top = folder / name
        if not top.is_dir():
            continue
        prefix, skip = str(top.relative_to(root)), len(str(top))
        for parent, file, ending in _files_below(top):
            yield f"{prefix}{parent[skip:]}/{file}", ending, _is_image(parent, file, ending)


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
    return any(_is_image(str(folder), path.name, path.suffix.lower()) for path in folder.iterdir() if path.is_file())


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
    return (Path(parent, file) for parent, file, end in _files_below(folder) if _is_image(parent, file, end))


def _is_image(parent: str, file: str, ending: str) -> bool:
    """By its ending, or else by its first bytes."""
    if ending in EXTENSIONS:
        return True
    try:
        path = Path(parent, file)
        if not path.is_file():  # reading a pipe would wait
            return False
        with path.open("rb") as opened:
            begin = opened.read(12)
    except OSError:
        return False
    return begin.startswith(SIGNATURES) or (begin[:4] == b"RIFF" and begin[8:] == b"WEBP")


def _files_below(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Each file's folder, name and ending; strings, since there may be millions."""
    # os.walk does not follow links, so a loop of links ends.
    for parent, folders, files in os.walk(folder, onerror=_cannot_list):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):  # the same order on every disk
            if not file.startswith("."):
                yield parent, file, os.path.splitext(file)[1].lower()  # noqa: PTH122 - a Path takes three times as long


def _shown(endings: Counter[str]) -> str:
    """How many files have which endings: "3 .heic, 1 .txt"; empty where there are none."""
    named = {ending or "without ending": count for ending, count in endings.items()}
    others = [f"{count} {name}" for name, count in sorted(named.items(), key=lambda item: (-item[1], item[0]))]
    text = ", ".join(others[:5]) + (" and others" if len(others) > 5 else "")
    return text + ("; .heic needs the extra heic: pip install 'coadvise[heic]'" if HEIF_EXTENSIONS & {*endings} else "")


def _other_files(folders: Iterable[Path]) -> str:
    """As `_shown`, of all files below some folders."""
    files = (found for folder in folders for found in _files_below(folder))
    return _shown(Counter(ending for parent, file, ending in files if not _is_image(parent, file, ending)))


def _cannot_list(error: OSError) -> None:
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
        raise UserError(
            f"'{folder}' holds no class folders with images ({', '.join(sorted(EXTENSIONS))}); "
            f"lay them out as {folder}/CLASS/IMAGE{advice}"
        )
    inner = with_images(folder / classes[0])
    if len(inner) > 1:
        advice = f"; '{folder / classes[0]}' has {len(inner)} ({few(inner)}): give that folder"
    raise UserError(
        f"'{folder}' holds one class, '{classes[0]}'"
        + (f", at data.depth={how.depth}" if how.depth else "")
        + f"; at least two are needed, each in a folder of its own{advice}"
    )
