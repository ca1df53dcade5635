"""Every image is decoded once; what cannot be read is left out and named."""

import errno
import hashlib
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_images

from coadvise.data import scan as scan_module
from coadvise.data.images import read_image, square, to_array
from coadvise.data.scan import ScannedSplit, scan, scan_split
from coadvise.data.sources import Source, Split, open_source
from coadvise.data.store import presized
from coadvise.errors import UserError


@pytest.mark.parametrize("in_memory", [True, False])
def test_all_images_in_order(image_folder: Path, in_memory: bool) -> None:
    source = open_source(image_folder, 0.2, 0)
    dataset = scan(source, 12, in_memory)
    assert dataset.classes == source.classes
    for scanned, split in ((dataset.train, source.train), (dataset.val, source.val)):
        assert scanned.paths == split.paths
        assert scanned.labels.tolist() == list(split.labels)
        assert not scanned.unreadable
        assert scanned.sizes == {(16, 16): len(split)}
        if in_memory:
            expected = np.stack([to_array(square(read_image(path), 12)) for path in split.paths])
            assert np.array_equal(scanned.pixels, expected)
        else:
            assert scanned.pixels is None
    assert dataset.val.per_class(3) == [6, 6, 6]


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_left_out_and_never_replaced(tmp_path: Path, in_memory: bool) -> None:
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(paths[-1])
    bad = {0: b"", 7: b"<html>", 8: paths[8].read_bytes()[:40], 19: b"\x89PNG"}
    for number, content in bad.items():
        paths[number].write_bytes(content)
    scanned = scan_split(Split(tuple(paths), tuple(n % 3 for n in range(20))), 8, in_memory)
    good = [number for number in range(20) if number not in bad]
    assert scanned.paths == tuple(paths[number] for number in good)
    assert scanned.labels.tolist() == [number % 3 for number in good]
    assert len(scanned.unreadable) == len(bad)
    for line, number in zip(scanned.unreadable, bad, strict=True):
        assert line.startswith(repr(str(paths[number])))
    if in_memory:
        assert scanned.pixels[:, 0, 0, 0].tolist() == good
    assert scanned.sizes == {(8, 8): 16}


def test_sizes_are_counted(tmp_path: Path) -> None:
    sizes = [(8, 8), (9, 5), (9, 5)]
    for number, size in enumerate(sizes):
        Image.new("L", size).save(tmp_path / f"{number}.png")
    split = Split(tuple(sorted(tmp_path.iterdir())), (0, 0, 0))
    assert scan_split(split, 8, True).sizes == Counter(sizes)


def test_a_class_without_a_readable_image_is_named_with_its_own_fault(tmp_path: Path) -> None:
    root = make_images(tmp_path, train=2, val=1)
    (root / "train" / "blue" / "0.png").write_bytes(b"")  # a fault elsewhere
    for path in (root / "train" / "green").iterdir():
        path.write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"class 'green' has no readable image.*train/green/0\.png': cannot identify"):
        scan(open_source(root, 0.2, 0), 16, True)


def test_nothing_left_to_score(tmp_path: Path) -> None:
    root = make_images(tmp_path, train=1, val=1)
    for path in (root / "val").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no readable image to score on.*first fault: .*val/blue/0\.png"):
        scan(open_source(root, 0.2, 0), 16, False)


def test_more_than_memory_holds_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "MEMORY_LIMIT", 2**20)
    split = Split((Path("missing.png"),) * 1500, (0,) * 1500)
    with pytest.raises(UserError, match=r"1500 images at 32 px.*augment\.kind=deit"):
        scan_split(split, 32, True)
    assert len(scan_split(split, 32, False).unreadable) == 1500


def test_photographs(photos: Path) -> None:
    dataset = scan(open_source(photos, 0.2, 0), 32, True)
    assert len(dataset.classes) == 10
    assert not dataset.train.unreadable + dataset.val.unreadable
    assert 0.3 < dataset.train.pixels.mean() / 255 < 0.7


def test_the_sum_is_of_the_files_in_order_and_no_names(tmp_path: Path) -> None:
    root = make_images(tmp_path / "a", train=3)
    split = scan(open_source(root, 0.2, 0), 16, in_memory=False).train
    by_hand = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in split.paths))
    assert split.sha256 == by_hand.hexdigest()
    (root / "train").rename(root / "elsewhere")
    moved = scan_split(
        Split(tuple(root / "elsewhere" / path.relative_to(root / "train") for path in split.paths), (0,) * 9), 16, True
    )
    assert moved.sha256 == split.sha256
    moved.paths[4].write_bytes(moved.paths[3].read_bytes())
    assert scan_split(Split(moved.paths, (0,) * 9), 16, True).sha256 != split.sha256
    gone = scan_split(Split(moved.paths, (0,) * 9), 16, True)
    moved.paths[0].unlink()
    with pytest.raises(UserError, match=r"cannot read '.*0\.png' any more: No such file"):
        _ = gone.sha256


def test_the_sum_is_of_all_files_of_a_large_split(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    split = ScannedSplit((tmp_path / "x",) * 4500, np.zeros(4500, np.int64), None, (), Counter())
    assert split.sha256 == hashlib.sha256(hashlib.sha256(b"1").digest() * 4500).hexdigest()


# what is kept ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coadvise"


def large_images(root: Path) -> Source:
    make_images(root, train=4, val=2, size=40)
    (root / "train" / "red" / "0.png").write_bytes(b"\x89PNG")
    return open_source(root, 0.2, 0)


@pytest.mark.parametrize("presize", [0, 24])
def test_images_are_decoded_once_whatever_process_or_run_asks(
    tmp_path: Path, cache: Path, presize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = large_images(tmp_path / "images")
    said: list[str] = []
    first = scan(source, 16, not presize, presize, said.append)
    if presize:
        assert [np.array_equal(first.train.presized[row], presized(read_image(path), 24))
                for row, path in enumerate(first.train.paths)] == [True] * 11  # fmt: skip
        assert len(said) == 1
        assert re.search(r"presizing 12 images to 24 px.*GiB are free", said[0])
    else:
        plain = scan_split(source.train, 16, in_memory=True)
        assert np.array_equal(first.train.pixels, plain.pixels)
        assert not said
    assert len(first.train.unreadable) == 1

    decoded = []
    monkeypatch.setattr(scan_module, "read_image", lambda path: decoded.append(path) or read_image(path))
    again = scan(source, 16, not presize, presize, said.append)
    assert not [path for path in decoded if path in source.train.paths]
    assert len(said) == bool(presize)
    for one, other in ((first.train, again.train), (first.val, again.val)):
        assert (one.paths, one.unreadable, one.sizes) == (other.paths, other.unreadable, other.sizes)
        assert np.array_equal(one.labels, other.labels)
    changed = source.train.paths[5]
    Image.new("RGB", (50, 50), (1, 2, 3)).save(changed)
    new = scan(source, 16, not presize, presize, said.append).train
    assert changed in decoded
    row = new.paths.index(changed)
    image = new.presized[row] if presize else new.pixels[row].transpose(1, 2, 0)
    assert (image == (1, 2, 3)).all()


def test_splits_and_sizes_are_kept_side_by_side(tmp_path: Path, cache: Path) -> None:
    source = large_images(tmp_path / "images")
    for size in (16, 12):
        scan(source, size, in_memory=True)
    assert len(list((cache / "images").iterdir())) == 4
    assert scan(source, 16, in_memory=True).train.pixels.shape == (11, 3, 16, 16)


def test_small_images_need_no_cache_folder_and_presized_ones_say_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = large_images(tmp_path / "images")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert scan(source, 16, in_memory=True).train.pixels.shape == (11, 3, 16, 16)
    with pytest.raises(UserError, match=r"cannot be written; set XDG_CACHE_HOME.*data\.presize=0"):
        scan(source, 16, in_memory=False, presize=24)


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_is_said_and_nothing_is_left(
    tmp_path: Path, cache: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = large_images(tmp_path / "images")

    def full(image: Image.Image, side: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    else:
        monkeypatch.setattr(scan_module, "presized", full)
    with pytest.raises(UserError, match=r"presized images.*(need 0\.00 GiB|No space left).*data\.presize=0"):
        scan(source, 16, in_memory=False, presize=24)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]
    if when == "before":
        assert scan(source, 16, in_memory=True).train.pixels.shape == (11, 3, 16, 16)
