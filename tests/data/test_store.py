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
from coadvise.data.sources.split import Keys, Split
from coadvise.data.store import Decode, Decoded, Seen, Store, UnreadNow, fingerprint, open_store, presized


def made(seed: int, count: int) -> list[tuple]:
    """Arrays of random shapes; about a third of the files cannot be read."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(1, 9, 2))
        array = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        span = (-1.5, 4095.0) if number % 4 == 0 else None
        seen = Seen(width, height, int(rng.integers(2**63)), number % 3, span)
        images.append((f"'{number}.png': broken", None) if rng.random() < 0.3 else (seen, array))
    return images


def keys_of(seed: int, count: int = 9) -> Keys:
    """Keys that no other seed has."""
    return np.uint64(seed << 32) + np.arange(count, dtype=np.uint64)


def decoder(images: list[tuple]) -> Decode:
    return lambda rows: [images[row] for row in rows]


def never(rows: object) -> Decoded:
    raise AssertionError("made again")


def holds(store: Store, images: list[tuple]) -> bool:
    outcomes = [store.faults.get(row) or store.seen(row) for row in range(len(store.table))]
    arrays = [array for _, array in images if array is not None]
    return outcomes == [outcome for outcome, _ in images] and all(
        map(np.array_equal, (store[row] for row in range(len(store))), arrays)
    )


def stores_in(folder: Path) -> dict[str, set[str]]:
    """The endings of the files of each store."""
    files = [path for path in folder.iterdir() if path.name != ".lock"]
    return {path.stem: {other.suffix for other in files if other.stem == path.stem} for path in files}


WHOLE = {".json", ".pixels", ".table"}


@given(st.integers(0, 10**6), st.integers(0, 12))
def test_a_store_gives_back_what_was_put_in_and_is_made_once(seed: int, count: int) -> None:
    images, keys = made(seed, count), keys_of(seed, count)
    with tempfile.TemporaryDirectory() as folder:
        first = open_store(Path(folder), keys, "kind", decoder(images))
        again = open_store(Path(folder), keys, "kind", never)
        elsewhere = pickle.loads(pickle.dumps(again))
        assert all(holds(store, images) for store in (first, again, elsewhere))
        assert len(first) == sum(array is not None for _, array in images)


def test_what_could_not_be_read_once_is_tried_again(tmp_path: Path) -> None:
    images, keys = made(3, 6), keys_of(3, 6)
    (passing, lasting), good = (UnreadNow("'0.png': no answer"), "'1.png': broken"), images[2:]
    first = open_store(tmp_path, keys, "kind", decoder([(passing, None), (lasting, None), *good]))
    assert first.faults[0] == passing
    asked: list[int] = []

    def decode(rows: np.ndarray) -> Decoded:
        asked.extend(rows.tolist())
        return [[images[0], (lasting, None), *good][row] for row in rows]

    second = open_store(tmp_path, keys, "kind", decode)
    assert {0, 1} <= set(asked), "what was read is not read again"
    assert len(asked) == len(first.faults)
    assert holds(second, [images[0], (lasting, None), *good])
    assert holds(open_store(tmp_path, keys, "kind", never), [images[0], (lasting, None), *good])


@given(st.integers(0, 10**6), st.data())
def test_pictures_that_an_older_store_read_are_not_read_again(seed: int, data: st.DataObject) -> None:
    images, keys = made(seed, 12), keys_of(seed, 12)
    before, after = (
        np.array(data.draw(st.permutations(range(12)))[: data.draw(st.integers(0, 12))], int) for _ in "12"
    )
    asked: list[int] = []

    def decode(rows: np.ndarray) -> Decoded:
        asked.extend(after[rows].tolist())
        return [images[after[row]] for row in rows]

    with tempfile.TemporaryDirectory() as folder:
        open_store(Path(folder), keys[before], "kind", lambda rows: [images[before[row]] for row in rows])
        asked.clear()
        assert holds(open_store(Path(folder), keys[after], "kind", decode), [images[row] for row in after])
    known = {row for row in before.tolist() if images[row][1] is not None}
    if before.tolist() != after.tolist():
        assert asked == [row for row in after.tolist() if row not in known]


def test_images_of_one_shape_are_one_array_and_a_store_pickles_small(tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (50, 3, 16, 16), dtype=np.uint8)
    images = [(Seen(16, 16, 1), array) for array in arrays]
    store = open_store(tmp_path, keys_of(0, 50), "kind", decoder(images))
    assert np.array_equal(store.stacked((3, 16, 16)), arrays)
    assert len(pickle.dumps(store)) < 5000 < arrays.nbytes


DAMAGES = {
    "a byte": (".pixels", lambda content: bytes([content[0] ^ 1]) + content[1:]),
    "a byte far behind": (".pixels", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "the end": (".pixels", lambda content: content[:-1]),
    "the table": (".table", lambda content: content[:9] + bytes([content[9] ^ 1]) + content[10:]),
    "no table": (".table", None),
    "the description": (".json", lambda content: content[:-5]),
    "no description": (".json", None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_made_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_BLOCK", 64)
    images, keys = made(1, 9), keys_of(1)
    open_store(tmp_path, keys, "kind", decoder(images))
    ending, change = DAMAGES[damage]
    [path] = tmp_path.glob(f"*{ending}")
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(content))
    with pytest.raises(AssertionError, match="made again"):
        open_store(tmp_path, keys, "kind", never)
    assert holds(open_store(tmp_path, keys, "kind", decoder(images)), images)


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    def full(rows: object) -> Iterator[tuple]:
        yield from made(2, 5)
        raise OSError(errno.ENOSPC, "No space left on device")

    before = made(3, 4)
    open_store(tmp_path, keys_of(3, 4), "kind", decoder(before))
    with pytest.raises(OSError, match="No space left"):
        open_store(tmp_path, keys_of(2), "kind", full)
    assert stores_in(tmp_path) == {fingerprint(keys_of(3, 4), "kind"): WHOLE}
    assert holds(open_store(tmp_path, keys_of(3, 4), "kind", never), before)


def test_a_new_fingerprint_replaces_the_store_unless_a_process_uses_it(tmp_path: Path) -> None:
    before, after = made(4, 9), made(5, 9)
    first, second, third = (fingerprint(keys_of(seed), "kind") for seed in (4, 5, 6))
    old = open_store(tmp_path, keys_of(4), "kind", decoder(before))
    (tmp_path / ".killed.pixels").write_bytes(b"what a killed process left")
    new = open_store(tmp_path, keys_of(5), "kind", decoder(after))
    assert stores_in(tmp_path) == {first: WHOLE, second: WHOLE}
    assert holds(old, before)  # mapped only now, as a loader process does
    assert holds(new, after)
    assert holds(open_store(tmp_path, keys_of(4), "kind", never), before)
    del old
    newest = open_store(tmp_path, keys_of(6), "kind", decoder(before))
    assert stores_in(tmp_path) == {second: WHOLE, third: WHOLE}
    assert holds(newest, before)
    assert holds(new, after)


def test_contents_are_found_once_and_damaged_ones_again(tmp_path: Path) -> None:
    images = [(Seen(1, 1, 7, content), None) for content in (5, 0, 6, 0)]
    images[2] = ("'2.png': broken", None)
    asked: list[list[int]] = []

    def find(rows: list[int]) -> list[int]:
        asked.append(rows)
        return [100 + row for row in rows]

    store = open_store(tmp_path, keys_of(0, 4), "kind", decoder(images))
    for _ in "12":
        assert store.contents(find).tolist() == [5, 101, 102]
    assert asked == [[1, 2]]
    [kept] = tmp_path.glob("*.contents")
    kept.write_bytes(kept.read_bytes()[:-9] + b"123456789")
    assert store.contents(find).tolist() == [5, 101, 102]
    assert asked == [[1, 2]] * 2


def fingerprint_of(split: Split, kind: str) -> str:
    return fingerprint(split.keys(), kind)


def test_a_fingerprint_is_of_names_sizes_times_modes_and_kind(tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(b"1234")
        os.utime(path, ns=(0, 10**9))
    whole = fingerprint_of(files(*paths), "32 square")
    assert fingerprint_of(files(*paths), "32 square") == whole
    others = [fingerprint_of(files(*paths), "48 square"), fingerprint_of(files(*paths[::-1]), "32 square")]
    others.append(fingerprint_of(files(paths[0]), "32 square"))
    for change in (
        lambda path: os.utime(path, ns=(0, 2 * 10**9)),
        lambda path: path.write_bytes(b"12345"),
        lambda path: (path.write_bytes(b"4321"), os.utime(path, ns=(0, 10**9))),  # size and time as before
        lambda path: path.chmod(0o600),
        lambda path: path.unlink(),
    ):
        change(paths[1])
        others.append(fingerprint_of(files(*paths), "32 square"))
    assert len({whole, *others}) == len(others) + 1


def test_another_pillow_or_another_decoder_makes_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint_of(files(), "32 square")
    with monkeypatch.context() as patch:
        patch.setattr(store_module.features, "version", lambda name: "0.1")
        assert fingerprint_of(files(), "32 square") != before
    for module in (store_module.images, store_module):
        with monkeypatch.context() as patch:
            changed = tmp_path / Path(module.__file__).name
            changed.write_text(Path(module.__file__).read_text() + "# changed")
            patch.setattr(module, "__file__", str(changed))
            assert fingerprint_of(files(), "32 square") != before


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
