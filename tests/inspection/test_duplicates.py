"""Copies: byte for byte, and resized or recompressed; near pairs against a comparison of all pairs."""

import imagehash
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_pictures import encoded, picture
from PIL import Image

from coadvise.data.images import decode
from coadvise.inspection import duplicates
from coadvise.inspection.duplicates import MOST_BITS, exact_groups, near_groups, near_pairs
from coadvise.inspection.findings import Findings

FLAT = np.zeros((1, 4, 4, 3), np.uint8)


def names(found: Findings, groups: tuple[tuple[int, ...], ...]) -> set[tuple[str, ...]]:
    return {tuple(found.places[number].name for number in group) for group in groups}


def test_planted_copies_are_found_and_nothing_else(found: Findings) -> None:
    assert names(found, found.exact) == {
        ("train/red/0.png", "val/red/copy.png"),
        ("train/blue/1.png", "train/green/two.png"),
    }
    assert names(found, found.near) == {("train/blue/0.png", "val/blue/small.jpg")}


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.data())
def test_all_pairs_of_close_hashes_are_compared(bases: list[int], data: st.DataObject) -> None:
    flips = data.draw(st.lists(st.tuples(st.sampled_from(bases), st.sets(st.integers(0, 63), max_size=7)), max_size=8))
    hashes = np.array([*bases, *(base ^ sum(1 << bit for bit in bits) for base, bits in flips)], np.uint64)
    wanted = {
        (one, other)
        for other in range(len(hashes))
        for one in range(other)
        if int(hashes[one] ^ hashes[other]).bit_count() <= MOST_BITS
    }
    assert {*map(tuple, near_pairs(hashes, FLAT.repeat(len(hashes), 0)).tolist())} == wanted


def test_pictures_with_close_hashes_must_look_alike_too() -> None:
    looks = np.stack([np.full((4, 4, 3), shade, np.uint8) for shade in (10, 11, 14)])
    assert near_pairs(np.zeros(3, np.uint64), looks).tolist() == [[0, 1]]


def test_thousands_of_blank_pictures_do_not_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_NEIGHBOURS", 3)
    looks = FLAT.repeat(50, 0)
    assert len(near_pairs(np.zeros(50, np.uint64), looks)) == 49 + 48 + 47
    assert near_groups([str(n) for n in range(50)], np.zeros(50, np.uint64), looks) == [tuple(range(50))]


def test_a_group_has_all_files_of_each_of_its_pictures() -> None:
    hashes = np.array([1, 2**64 - 1, 1, 3, 2**64 - 1], np.uint64)
    digests = ["a", "b", "a", "c", "b"]
    assert near_groups(digests, hashes, FLAT.repeat(5, 0)) == [(0, 2, 3)]
    assert exact_groups(digests) == [(0, 2), (1, 4)]


def test_copies_of_all_kinds_are_told_from_other_pictures() -> None:
    rng = np.random.default_rng(3)
    originals = [picture(rng, number % 3, 96) for number in range(40)]
    kinds = [("JPEG", 60), ("WEBP", 60), ("PNG", 0)]
    copies = []
    for number, image in enumerate(originals):
        side, (kind, quality) = int(rng.integers(40, 140)), kinds[number % 3]
        options = {"quality": quality} if quality else {}
        copies.append(decode(encoded(image.resize((side, side)), kind, **options), ""))
    hashes = [np.packbits(imagehash.phash(image).hash).tobytes() for image in originals + copies]
    looks = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) for image in originals + copies])
    pairs = near_pairs(np.frombuffer(b"".join(hashes), np.uint64), looks).tolist()
    right = [pair for pair in pairs if pair[1] == pair[0] + 40]
    assert len(right) >= 0.95 * 40
    assert len(right) >= 0.95 * len(pairs)
