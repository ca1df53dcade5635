"""metrics.jsonl: appended to, rewound, and whole again after a crash."""

import multiprocessing
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coadvise.errors import StorageError, UserError
from coadvise.training.metrics import FILE, REWIND, Follower, Recorder, read_records

records = st.lists(
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["train", "eval", "result"])},
        optional={"part": st.sampled_from("ab"), "step": st.integers(0, 9), "text": st.text(max_size=5)},
    ),
    max_size=8,
)


def recorder(folder: Path, write: bool = True, followers: Sequence[Follower] = ()) -> Recorder:
    return Recorder(folder, write, lambda text: None, followers)


def written(folder: Path, entries: list[dict[str, Any]]) -> Recorder:
    made = recorder(folder)
    for entry in entries:
        made.add(**entry)
    return made


@given(records, st.sampled_from("ab"), st.integers(0, 9))
def test_rewinding_removes_what_one_part_recorded_later(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]], part: str, step: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    written(folder, entries).rewind(part, step)
    assert read_records(folder) == [
        entry
        for entry in entries
        if entry.get("part") != part or (entry.get("step", 0) <= step and entry["kind"] != "result")
    ]


@given(records.filter(len), st.integers(0, 60), records)
def test_a_line_cut_by_a_crash_costs_that_line_only(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]], cut: int, later: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    written(folder, entries)
    lines = (folder / FILE).read_bytes().splitlines(keepends=True)
    (folder / FILE).write_bytes(b"".join(lines[:-1]) + lines[-1][: min(cut, len(lines[-1]) - 2)])
    assert read_records(folder) == entries[:-1]
    written(folder, later)  # the run goes on
    assert read_records(folder) == entries[:-1] + later


@pytest.mark.parametrize("line", [b'{"kind": ', b"\xff", b"[3]", b'{"kinc": "a"}', b""])
def test_damage_elsewhere_is_an_error(line: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"kind": "a"}\n' + line + b'\n{"kind": "b"}\n')
    with pytest.raises(UserError, match=r"damaged record: .*metrics\.jsonl, line 2 is not a record"):
        read_records(tmp_path)


def test_only_one_process_writes_and_followers_get_every_record(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    other = recorder(tmp_path, write=False, followers=[heard.append])
    other.add("train", step=3)
    other.rewind("a", 0)
    assert not (tmp_path / FILE).exists()
    assert read_records(tmp_path) == []
    asked = {"kind": REWIND, "part": "a", "step": 0}
    assert heard == [{"kind": "train", "step": 3}, asked], "the process that writes must hear of both"
    written(tmp_path, [{"kind": "train", "part": "a", "step": 5}])
    other.rewind("a", 0)
    assert len(read_records(tmp_path)) == 1


def test_networks_that_are_trained_at_the_same_time_keep_each_other_s_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")

    def work(part: str) -> None:
        own = recorder(tmp_path)
        for step in range(30):
            own.add("train", part=part, step=step)
            own.rewind(part, step)  # writes the whole file again

    processes = [context.Process(target=work, args=(part,)) for part in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for part in "abc":
        assert [r["step"] for r in read_records(tmp_path) if r["part"] == part] == list(range(30))


def test_nothing_stays_of_a_record_that_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    made = written(tmp_path, [{"kind": "train"}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE).stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(StorageError):
            made.add("eval")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    made.add("result")
    assert [record["kind"] for record in read_records(tmp_path)] == ["train", "result"]
