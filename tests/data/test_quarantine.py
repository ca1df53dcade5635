"""Training files that cannot be read are skipped, listed and counted, and too many of them end the run."""

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import files

from coadvise.data.quarantine import FILE, Quarantine, check_share
from coadvise.data.scanned import ScannedSplit
from coadvise.errors import UserError


def split_of(*names: str, unreadable: tuple[str, ...] = ()) -> ScannedSplit:
    split = files(*names)
    return ScannedSplit(split, split.labels, None, unreadable, Counter())


def fault(name: str, why: str = "truncated") -> str:
    return f"{name!r}: {why}"


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)


@settings(max_examples=10)
@given(st.lists(names, unique=True, min_size=1, max_size=6), st.text("': \"\\", max_size=6), st.data())
def test_a_file_is_listed_once_whatever_its_name_and_whatever_is_wrong_with_it(
    tmp_path_factory: pytest.TempPathFactory, listed_names: list[str], why: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    quarantine = Quarantine(folder, split_of(*listed_names), 1.0)
    listed: list[str] = []
    for number in data.draw(st.lists(st.integers(0, len(listed_names) - 1), max_size=8)):
        reason = data.draw(st.sampled_from([why or "x", "gone"]))
        listed += quarantine.add({number: fault(listed_names[number], reason)})
    assert quarantine.count() == len(listed) == len(set(listed))
    keys = [next(name for name in listed_names if line.startswith(repr(name) + ": ")) for line in listed]
    assert len(set(keys)) == len(keys)
    assert ((folder / FILE).read_text() if listed else "") == "".join(f"{line}\n" for line in listed)


def test_it_begins_with_the_scan_s_and_keeps_what_is_still_gone(tmp_path: Path) -> None:
    empty = Quarantine(tmp_path, split_of("a", "b", "c", "d"), 1.0)
    empty.begin()
    assert not (tmp_path / FILE).exists()
    assert empty.add({0: fault("a", "gone"), 1: fault("b", "gone"), 2: fault("c", "gone")}) != []
    # a was repaired, b is named by the scan now, c has vanished
    Quarantine(tmp_path, split_of("a", "d", unreadable=(fault("b", "empty"),)), 1.0).begin()
    assert (tmp_path / FILE).read_text().splitlines() == [fault("b", "empty"), fault("c", "gone")]
    Quarantine(tmp_path, split_of("a", "b", "c", "d"), 1.0).begin()
    assert (tmp_path / FILE).read_text() == ""


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    split = split_of(*"abcd")
    one, other = Quarantine(tmp_path, split, 0.5), Quarantine(tmp_path, split, 0.5)
    assert one.add({0: fault("a")}) == [fault("a")]
    assert other.add({0: fault("a", "gone")}) == []
    assert other.add({1: fault("b"), 0: fault("a")}) == [fault("b")]
    assert one.count() == other.count() == 2
    with pytest.raises(UserError, match=re.escape("3 of 4 training images cannot be read, data.max_unreadable=0.5")):
        one.add({2: fault("c")})
    assert other.count() == 3  # listed before the run ends
    with pytest.raises(UserError, match="'d': truncated"):
        Quarantine(tmp_path, split, 0.99).add({3: fault("d")})


@given(st.integers(1, 1000), st.integers(0, 1000), st.floats(0, 1))
def test_the_share_is_of_all_files(files: int, unreadable: int, most: float) -> None:
    unreadable = min(unreadable, files)
    if unreadable > most * files:
        with pytest.raises(UserError, match="cannot be read"):
            check_share("training", unreadable, files, most, "x")
    else:
        assert check_share("training", unreadable, files, most, "x") is None
