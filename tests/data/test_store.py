"""Stores give back what was put in, are there whole or not at all, and are made once."""

import errno
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from samples import files

from coadvise.data import store as store_module
from coadvise.data.store import Decoded, Seen, Store, fingerprint, open_store, presized


def made(seed: int, count: int) -> list[tuple]:
    """Arrays of random shapes; about a third of the files cannot be read."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(1, 9, 2))
        array = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        images.append((f"'{number}.png': broken", None) if rng.random() < 0.3 else (Seen(width, height, "ab"), array))
    return images


def never() -> Decoded:
    raise AssertionError("made again")


def holds(store: Store, images: list[tuple]) -> bool:
    arrays = [array for _, array in images if array is not None]
    return list(store.outcomes) == [outcome for outcome, _ in images] and all(
        map(np.array_equal, (store[row] for row in range(len(store))), arrays)
    )


@given(st.integers(0, 10**6), st.integers(0, 12))
def test_a_store_gives_back_what_was_put_in_and_is_made_once(seed: int, count: int) -> None:
    images = made(seed, count)
    with tempfile.TemporaryDirectory() as folder:
        first = open_store(Path(folder), "f", lambda: iter(images))
        again = open_store(Path(folder), "f", never)
        elsewhere = pickle.loads(pickle.dumps(again))
        assert all(holds(store, images) for store in (first, again, elsewhere))
        assert len(first) == sum(array is not None for _, array in images)


def test_images_of_one_shape_are_one_array_and_a_store_pickles_small(tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (50, 3, 16, 16), dtype=np.uint8)
    store = open_store(tmp_path, "f", lambda: ((Seen(16, 16, "ab"), array) for array in arrays))
    assert np.array_equal(store.stacked((3, 16, 16)), arrays)
    assert len(pickle.dumps(store)) < 5000 < arrays.nbytes


DAMAGES = {
    "a byte": ("f.pixels", lambda content: bytes([content[0] ^ 1]) + content[1:]),
    "a byte far behind": ("f.pixels", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "the end": ("f.pixels", lambda content: content[:-1]),
    "the description": ("f.json", lambda content: content[:-5]),
    "no description": ("f.json", None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_made_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_BLOCK", 64)
    images = made(1, 9)
    open_store(tmp_path, "f", lambda: iter(images))
    name, change = DAMAGES[damage]
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if change:
        (tmp_path / name).write_bytes(change(content))
    with pytest.raises(AssertionError, match="made again"):
        open_store(tmp_path, "f", never)
    assert holds(open_store(tmp_path, "f", lambda: iter(images)), images)


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    def full() -> Iterator[tuple]:
        yield from made(2, 5)
        raise OSError(errno.ENOSPC, "No space left on device")

    before = made(3, 4)
    open_store(tmp_path, "old", lambda: iter(before))
    with pytest.raises(OSError, match="No space left"):
        open_store(tmp_path, "new", full)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "old.json", "old.pixels"]
    assert holds(open_store(tmp_path, "old", never), before)


def test_a_new_fingerprint_replaces_the_store_unless_a_process_uses_it(tmp_path: Path) -> None:
    before, after = made(4, 6), made(5, 6)
    old = open_store(tmp_path, "old", lambda: iter(before))
    (tmp_path / ".killed.pixels").write_bytes(b"what a killed process left")
    new = open_store(tmp_path, "new", lambda: iter(after))
    assert sorted(path.stem for path in tmp_path.iterdir()) == [".lock", "new", "new", "old", "old"]
    assert holds(old, before)  # mapped only now, as a loader process does
    assert holds(new, after)
    assert holds(open_store(tmp_path, "old", never), before)
    del old
    newest = open_store(tmp_path, "newest", lambda: iter(before))
    assert sorted(path.stem for path in tmp_path.iterdir()) == [".lock", "new", "new", "newest", "newest"]
    assert holds(newest, before)
    assert holds(new, after)


def test_a_fingerprint_is_of_names_sizes_times_modes_and_kind(tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(b"1234")
        os.utime(path, ns=(0, 10**9))
    whole = fingerprint(files(*paths), "32 square")
    assert fingerprint(files(*paths), "32 square") == whole
    others = [fingerprint(files(*paths), "48 square"), fingerprint(files(*paths[::-1]), "32 square")]
    others.append(fingerprint(files(paths[0]), "32 square"))
    for change in (
        lambda path: os.utime(path, ns=(0, 2 * 10**9)),
        lambda path: path.write_bytes(b"12345"),
        lambda path: (path.write_bytes(b"4321"), os.utime(path, ns=(0, 10**9))),  # size and time as before
        lambda path: path.chmod(0o600),
        lambda path: path.unlink(),
    ):
        change(paths[1])
        others.append(fingerprint(files(*paths), "32 square"))
    assert len({whole, *others}) == len(others) + 1


def test_another_pillow_or_another_decoder_makes_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(files(), "32 square")
    with monkeypatch.context() as patch:
        patch.setattr(store_module.features, "version", lambda name: "0.1")
        assert fingerprint(files(), "32 square") != before
    for module in (store_module.images, store_module):
        with monkeypatch.context() as patch:
            changed = tmp_path / Path(module.__file__).name
            changed.write_text(Path(module.__file__).read_text() + "# changed")
            patch.setattr(module, "__file__", str(changed))
            assert fingerprint(files(), "32 square") != before


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 120))
def test_presized_images_are_no_smaller_than_asked_and_never_enlarged(width: int, height: int, side: int) -> None:
    array = presized(Image.new("RGB", (width, height), (9, 8, 7)), side)
    assert (array == (9, 8, 7)).all()
    assert min(array.shape[:2]) == min(side, width, height)
    if min(width, height) <= side:
        assert array.shape == (height, width, 3)
    else:  # as oblong as before, to half a pixel
        scale = side / min(width, height)
        assert abs(array.shape[0] - height * scale) <= 0.5
        assert abs(array.shape[1] - width * scale) <= 0.5
