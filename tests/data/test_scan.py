"""Every picture is decoded once for all processes and runs; what cannot be read is left out and named."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from samples import encoded, files
from tiny import make_images

from coadvise.data import decoding
from coadvise.data import images as images_module
from coadvise.data import scan as scan_module
from coadvise.data import scanned as scanned_module
from coadvise.data.images import fitted, to_array
from coadvise.data.scan import scan, scan_split
from coadvise.data.scanned import changes_of, scored_and_trained_on, under_two_labels
from coadvise.data.sources import Source, open_source
from coadvise.data.store import presized
from coadvise.errors import UserError


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_left_out_and_never_replaced(tmp_path: Path, in_memory: bool) -> None:
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(paths[-1])
    bad = {0: b"", 7: b"<html>", 8: paths[8].read_bytes()[:40], 19: b"\x89PNG"}
    for number, content in bad.items():
        paths[number].write_bytes(content)
    scanned = scan_split(files(*paths, labels=[n % 3 for n in range(20)]), 8, in_memory)
    good = [number for number in range(20) if number not in bad]
    assert scanned.split.names() == [str(paths[number]) for number in good]
    assert scanned.labels.tolist() == [number % 3 for number in good]
    assert len(scanned.unreadable) == len(bad)
    for line, number in zip(scanned.unreadable, bad, strict=True):
        assert line.startswith(repr(str(paths[number])))
    if in_memory:
        assert scanned.pixels[:, 0, 0, 0].tolist() == good
    assert scanned.sizes == {(8, 8): 16}
    assert scanned.per_class(3) == [6, 5, 5]
    assert [scanned.picture(row).getpixel((0, 0))[0] for row in range(16)] == good


def test_a_disk_that_did_not_answer_costs_no_picture(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(make_images(tmp_path, train=4, val=2))
    read = images_module.read_file

    def failing(path: Path) -> bytes:
        if str(path).endswith("/0.png"):
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr("coadvise.data.sources.folder.FolderSplit.read", lambda split, row: failing(split.path(row)))
        assert len(scan(source, 16, in_memory=True).train.unreadable) == 3
    assert not scan(source, 16, in_memory=True).train.unreadable


def test_a_class_or_split_without_a_readable_image_is_named_with_its_own_fault(tmp_path: Path) -> None:
    root = make_images(tmp_path, train=2, val=1)
    (root / "train" / "blue" / "0.png").write_bytes(b"")  # a fault elsewhere
    for path in (root / "train" / "green").iterdir():
        path.write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"class 'green' has no readable image.*'train/green/0\.png': not an image"):
        scan(open_source(root), 16, True)
    for path in root.glob("*/*/*"):
        (path.write_bytes(b"") if path.parts[-3] == "val" else Image.new("L", (8, 8)).save(path))
    with pytest.raises(UserError, match=r"no readable image to score on.*'val/blue/0\.png'"):
        scan(open_source(root), 16, False)


def test_more_than_memory_holds_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "MEMORY_LIMIT", 2**20)
    split = files(*["missing.png"] * 1500)
    with pytest.raises(UserError, match=r"1500 images at 32 px.*augment\.kind=deit"):
        scan_split(split, 32, True)
    assert len(scan_split(split, 32, False).unreadable) == 1500


# digests -------------------------------------------------------------------------------------------------------------


def test_the_sum_is_of_contents_in_order_and_of_no_names(tmp_path: Path) -> None:
    root = make_images(tmp_path, train=3)
    paths = sorted((root / "train").rglob("*.png"))
    whole = scan_split(files(*paths), 16, True).sha256
    (root / "train").rename(root / "elsewhere")
    moved = [root / "elsewhere" / path.relative_to(root / "train") for path in paths]
    assert scan_split(files(*moved), 16, False).sha256 == whole
    assert scan_split(files(*moved[::-1]), 16, False).sha256 != whole
    moved[4].write_bytes(moved[3].read_bytes())
    assert scan_split(files(*moved), 16, True).sha256 != whole


def test_pictures_both_trained_and_scored_on_are_found(tmp_path: Path) -> None:
    root = make_images(tmp_path, train=3, val=2)
    shutil.copy(root / "train" / "red" / "2.png", root / "val" / "blue" / "1.png")
    assert scored_and_trained_on(scan(open_source(root), 16, True)) == [("val/blue/1.png", "train/red/2.png")]


def test_pictures_under_two_labels_are_found(tmp_path: Path) -> None:
    root = make_images(tmp_path, train=3, val=2)
    assert under_two_labels(scan(open_source(root), 16, True)) == []
    shutil.copy(root / "train" / "red" / "2.png", root / "train" / "red" / "1.png")  # twice, but right
    shutil.copy(root / "train" / "red" / "2.png", root / "val" / "blue" / "1.png")
    shutil.copy(root / "train" / "green" / "0.png", root / "train" / "blue" / "0.png")
    assert sorted(under_two_labels(scan(open_source(root), 16, True))) == [
        ("train/blue/0.png", "train/green/0.png"),
        ("train/red/1.png", "val/blue/1.png"),
    ]


def test_a_listing_tells_what_changed(tmp_path: Path) -> None:
    root = make_images(tmp_path, train=4, val=1)
    train = root / "train"
    (train / "red" / "3.png").write_bytes(b"broken")
    (train / "red" / "new\nline.png").write_bytes((train / "red" / "0.png").read_bytes())
    before = [*scan(open_source(root), 16, False).train.listing()]
    assert len(before) == 13
    assert all(line.isprintable() for line in before)
    Image.new("RGB", (9, 9)).save(train / "red" / "3.png")  # readable now
    (train / "blue" / "1.png").write_bytes((train / "blue" / "0.png").read_bytes())
    (train / "green" / "0.png").rename(train / "blue" / "0b.png")
    changes = changes_of(before[::-1], scan(open_source(root), 16, False).train.listing())
    assert (changes.added, changes.removed) == (("train/blue/0b.png",), ("train/green/0.png",))
    assert sorted(changes.replaced) == ["train/blue/1.png", "train/red/3.png"]
    assert str(changes_of(before, before[::-1])) == "in another order"


listings = st.dictionaries(st.text("ab ", min_size=1, max_size=3), st.sampled_from(["1 0", "2 0", "1 1"]))


@given(listings, listings)
def test_changes_are_those_of_sets(old: dict[str, str], new: dict[str, str]) -> None:
    changes = changes_of(*([f"{about} {name}" for name, about in lines.items()] for lines in (old, new)))
    assert {*changes.added} == new.keys() - old.keys()
    assert {*changes.removed} == old.keys() - new.keys()
    assert {*changes.replaced} == {name for name in new.keys() & old.keys() if new[name] != old[name]}
    assert bool(changes) == (old != new)


# headers -------------------------------------------------------------------------------------------------------------


def photo(width: int, height: int, form: str, **options: object) -> bytes:
    rng = np.random.default_rng(width)
    return encoded(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), form, **options)


TURNED = Image.Exif()
TURNED[0x0112] = 6
CONTENTS = {
    "small.jpg": photo(20, 30, "JPEG"),
    "large.jpg": photo(300, 400, "JPEG", quality=95),
    "turned.jpg": photo(20, 30, "JPEG", exif=TURNED),
    "large.png": photo(200, 300, "PNG"),
    "one.webp": photo(20, 30, "WEBP"),
    "one.gif": photo(20, 30, "GIF"),
    "one.tif": photo(20, 30, "TIFF"),
    "zeros.jpg": photo(20, 30, "JPEG") + bytes(9),
    "trailer.jpg": photo(20, 30, "JPEG") + b"more",
    "cut.jpg": photo(300, 400, "JPEG", quality=95)[:-5000],
    "cut.png": photo(200, 300, "PNG")[:-500],
    "cut.webp": photo(20, 30, "WEBP")[:-20],
    "cut.gif": photo(20, 30, "GIF")[:-300],
    "empty.jpg": b"",
    "page.jpg": b"<html>",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_header_tells_what_decoding_does(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(CONTENTS[name])
    split = files(path)
    [(decoded, _)] = decoding.decode_rows(split, None, [0])
    [(by_header, _)] = decoding.look_at_headers(split, [0])
    assert isinstance(by_header, str) == (not name.startswith(("small", "large", "turned", "one", "zeros", "trailer")))
    if isinstance(by_header, str):
        assert by_header == decoded
    else:
        assert by_header[:3] == decoded[:3]
        assert by_header.content in (decoded.content, 0)
        assert by_header.content or len(CONTENTS[name]) > 2**16


def test_several_processes_find_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1500):
        (tmp_path / f"{number}.jpg").write_bytes([*CONTENTS.values()][number % len(CONTENTS)])
    split = files(*(tmp_path / f"{number}.jpg" for number in range(1500)))
    rows = np.arange(1500)[::-1]
    one = [*decoding.look_at_headers(split, rows)]
    monkeypatch.setattr(decoding, "MANY", 1000)
    monkeypatch.setattr(decoding, "available_cores", lambda: 2)
    assert [*decoding.look_at_headers(split, rows)] == one


def test_no_picture_to_train_on_is_decoded_at_a_start(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(make_images(tmp_path, train=3, val=2))
    decoded: list[str] = []
    decode = decoding.decode_image
    monkeypatch.setattr(
        decoding, "decode_image", lambda content, name, *rest: decoded.append(name) or decode(content, name, *rest)
    )
    dataset = scan(source, 16, in_memory=False)
    assert decoded == source.val.names()
    assert dataset.train.identity == scan_split(source.train, 16, in_memory=False).identity


def test_whole_contents_are_read_only_where_they_are_asked_for(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_images(tmp_path / "images", train=2, val=1)
    large = root / "train" / "blue" / "large.jpg"
    large.write_bytes(CONTENTS["large.jpg"])
    whole = scan_split(open_source(root).train, 16, in_memory=False)
    scanned = scan(open_source(root), 16, in_memory=False).train
    assert (scanned.contents == 0).tolist() == [path.endswith("large.jpg") for path in scanned.split.names()]
    assert scanned.sha256 == whole.sha256
    monkeypatch.setattr(scanned_module, "read_bytes", None)
    assert scan(open_source(root), 16, in_memory=False).train.sha256 == whole.sha256
    changed = bytearray(CONTENTS["large.jpg"])
    changed[len(changed) // 2] ^= 1  # where neither end nor the size tells
    assert len(changed) > 2**16
    large.write_bytes(changed)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    again = scan(open_source(root), 16, in_memory=False).train
    assert again.identity == scanned.identity
    assert again.sha256 != whole.sha256


# what is kept --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coadvise"


def large_images(root: Path) -> Source:
    make_images(root, train=4, val=2, size=40)
    (root / "train" / "red" / "0.png").write_bytes(b"\x89PNG")
    return open_source(root)


@pytest.mark.parametrize(("in_memory", "presize"), [(True, 0), (False, 24), (False, 0)])
def test_pictures_are_decoded_once_whatever_process_or_run_asks(
    tmp_path: Path, cache: Path, in_memory: bool, presize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = large_images(tmp_path / "images")
    said: list[str] = []
    first = scan(source, 16, in_memory, presize, said.append)
    if presize:
        assert all(
            np.array_equal(first.train.presized[row], presized(first.train.picture(row), 24)) for row in range(11)
        )
    elif in_memory:
        assert np.array_equal(first.train.pixels, scan_split(source.train, 16, in_memory=True).pixels)
    assert len(first.train.unreadable) == 1
    assert first.train.identity == scan_split(source.train, 16, in_memory=False).identity

    read = []
    for kind in ("_decode_one", "_look_at_header"):
        one = getattr(decoding, kind)
        spy = lambda split, *rest, one=one: read.append(split.name(rest[-1])) or one(split, *rest)  # noqa: E731
        monkeypatch.setattr(decoding, kind, spy)
    again = scan(source, 16, in_memory, presize, said.append)
    assert not read
    assert len(said) == bool(presize)
    for one, other in ((first.train, again.train), (first.val, again.val)):
        assert [*one.listing()] == [*other.listing()]
        assert (one.unreadable, one.sizes, one.identity) == (other.unreadable, other.sizes, other.identity)
    name = source.train.name(5)
    Image.new("RGB", (50, 50), (1, 2, 3)).save(tmp_path / "images" / name)
    new = scan(open_source(tmp_path / "images"), 16, in_memory, presize, said.append).train
    assert {*read} == {name, "train/red/0.png"}  # no other, but for the one that could not be read
    row = new.split.names().index(name)
    assert new.digests[row] != first.train.digests[row]
    assert new.picture(row).getpixel((0, 0)) == (1, 2, 3)
    if in_memory or presize:
        assert ((new.presized if presize else new.pixels.transpose(0, 2, 3, 1))[row] == (1, 2, 3)).all()


@pytest.mark.parametrize(("in_memory", "presize"), [(True, 0), (False, 24), (False, 0)])
def test_pictures_of_12_bits_are_scaled_by_what_the_training_pictures_span(
    tmp_path: Path, cache: Path, in_memory: bool, presize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_images(tmp_path / "images", train=3, val=2)
    wide = np.random.default_rng(0).integers(20, 4000, (3, 16, 16), dtype=np.uint16)
    wide[1, 5, 5], wide[2, 7, 7] = 4095, 0
    for name, pixels in zip(("train/red/0", "train/blue/2", "val/green/0"), wide * [[[1]], [[1]], [[2]]], strict=True):
        Image.fromarray(pixels.astype(np.uint16)).save(root / f"{name}.png")
    plain = np.asarray(Image.open(root / "train" / "red" / "1.png"))
    dataset = scan(open_source(root), 16, in_memory, presize)
    train, val = dataset.train, dataset.val
    assert train.values == val.values == (wide[:2].min(), 4095)
    assert train.preprocessing == {"value_range": [wide[:2].min(), 4095]}
    low, levels = int(wide[:2].min()), {}
    for split, name, pixels in ((train, "train/red/0.png", wide[0]), (val, "val/green/0.png", 2 * wide[2].astype(int))):
        row = split.split.names().index(name)
        levels[name] = np.rint((pixels.clip(low, 4095) - low) * (255 / (4095 - low)))
        assert np.array_equal(split.still(row, 16)[0], levels[name])
        if in_memory:
            assert np.array_equal(split.pixels[row], split.still(row, 16))
    if presize:
        row = train.split.names().index("train/red/0.png")
        assert np.array_equal(train.presized[row][..., 2], levels["train/red/0.png"])
    assert np.array_equal(train.picture(train.split.names().index("train/red/1.png")), plain)
    monkeypatch.setattr(decoding, "decode_image", lambda *_: pytest.fail("decoded again"))
    again = scan(open_source(root), 16, in_memory, presize)
    assert again.train.values == train.values
    if in_memory:
        assert np.array_equal(again.train.pixels, train.pixels)


def test_ways_of_fitting_are_kept_apart(tmp_path: Path, cache: Path) -> None:
    source = large_images(tmp_path / "images")
    for fit in ("crop", "pad", "stretch", "crop"):
        for size in (16, (16, 24), (24, 16)):
            split = scan(source, size, in_memory=True, fit=fit).train
            assert np.array_equal(split.pixels[3], split.still(3, size))
            assert np.array_equal(split.pixels[3], to_array(fitted(split.picture(3), size, fit)))
            assert split.preprocessing == ({} if fit == "crop" else {"fit": fit})


def test_a_large_jpeg_has_its_whole_size(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "LARGE", 100 * 100)
    root, turned = make_images(tmp_path / "images", train=1, val=1), Image.Exif()
    turned[274] = 6
    Image.new("RGB", (320, 160), "red").save(root / "train" / "red" / "0.jpg", exif=turned)
    for in_memory, presize in ((True, 0), (False, 16), (False, 0)):
        train = scan(open_source(root), 16, in_memory, presize).train
        assert train.sizes == {(16, 16): 3, (160, 320): 1}
    assert scan(open_source(root), 16, False, 16).train.presized[2].shape == (32, 16, 3)


def test_only_presized_images_need_a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = large_images(tmp_path / "images")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert scan(source, 16, in_memory=True).train.pixels.shape == (11, 3, 16, 16)
    assert len(scan(source, 16, in_memory=False).train.digests) == 11
    with pytest.raises(UserError, match=r"cannot be written; set XDG_CACHE_HOME.*data\.presize=0"):
        scan(source, 16, in_memory=False, presize=24)


def test_a_full_disk_is_reported_and_nothing_is_left(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = large_images(tmp_path / "images")

    def full(image: Image.Image, side: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def refused() -> None:
        with pytest.raises(UserError, match=r"presized images.*(GiB|No space left).*data\.presize=0"):
            scan(source, 16, in_memory=False, presize=24)
        left = [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]
        assert not [path for path in left if "presized" in path.parent.name]

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        refused()
        assert scan(source, 16, in_memory=True).train.pixels.shape == (11, 3, 16, 16)
    monkeypatch.setattr(scan_module, "presized", full)
    refused()
