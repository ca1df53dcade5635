"""The command: a page, JSON, a table that `fit` takes; what cannot be used is refused before any image is read."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest

from coadvise.cli import main
from coadvise.data.sources import open_source
from coadvise.errors import UserError
from coadvise.inspection.check import check_outputs, source_to_check, write_cleaned
from coadvise.inspection.findings import USUALLY, Findings


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["coadvise", "check", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_writes_a_page_and_a_table(
    found: Findings, faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, faulty, "data.exclude=[green]", "--write", "cleaned.csv") == 0
    out = capsys.readouterr().out
    assert "1. Scores will be too high" in out
    assert f"page: {faulty.name}-check.html" in out
    assert "left out: 1 files that cannot be read, 1 further copies" in out
    assert (tmp_path / f"{faulty.name}-check.html").read_text().startswith("<!doctype html>")
    source = open_source(tmp_path / "cleaned.csv")
    assert source.classes == ("blue", "red")
    monkeypatch.setattr("coadvise.inspection.check.inspect", lambda *arguments: found)  # of the same data
    assert command(monkeypatch, faulty, "--json", "--out", "p.html", "--write", "w.csv", "--leave-out", "near") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["page"] == "p.html"
    assert result["written"] == {"table": "w.csv", "left_out": {"near": 1}}
    assert result["sentences"][0].startswith("Scores will be too high")


def test_on_a_terminal_each_kind_is_asked_for(
    found: Findings, faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def confirm(text: str, default: bool) -> bool:
        asked.append((text, default))
        return "resized" in text

    monkeypatch.setattr("typer.confirm", confirm)
    monkeypatch.setattr("coadvise.inspection.check.inspect", lambda *arguments: found)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert command(monkeypatch, faulty, "--write", "cleaned.csv") == 0
    assert ("leave out 1 files that cannot be read?", True) in asked
    assert ("leave out 1 resized or recompressed copies?", False) in asked
    assert capsys.readouterr().out.strip().endswith("table: cleaned.csv, left out: 1 resized or recompressed copies")


def test_a_cleaned_table_is_the_same_data_without_what_is_left_out(found: Findings, tmp_path: Path) -> None:
    assert write_cleaned(found, tmp_path / "cleaned.csv", USUALLY) == {
        "unreadable": 1,
        "duplicates": 2,
        "two-labels": 1,
    }
    source, old = open_source(tmp_path / "cleaned.csv"), found.pictures.source
    assert source.classes == old.classes
    gone = {"train/red/broken.png", "train/red/0.png", "train/green/two.png", "train/blue/1.png"}
    for new, before in ((source.train, old.train), (source.val, old.val)):
        kept = [
            (name, label)
            for name, label in zip(before.names(), before.labels.tolist(), strict=True)
            if name not in gone
        ]
        there = [os.path.relpath(os.path.join(tmp_path, name), old.where) for name in new.names()]  # noqa: PTH118
        assert sorted(zip(there, new.labels.tolist(), strict=True)) == sorted(kept)


def test_paths_are_relative_where_the_images_lie_below_the_table(found: Findings, faulty: Path, tmp_path: Path) -> None:
    def paths(table: Path) -> list[str]:
        write_cleaned(found, table, ())
        with table.open() as file:
            return [row["path"] for row in csv.DictReader(file)]

    try:
        assert paths(faulty.parent / "beside.csv")[0] == f"{faulty.name}/train/blue/0.png"
    finally:
        (faulty.parent / "beside.csv").unlink(missing_ok=True)
    assert paths(tmp_path / "elsewhere.csv")[0] == str(faulty / "train/blue/0.png")


def test_the_seed_decides_the_same_split_as_in_fit(faulty: Path, tmp_path: Path) -> None:
    source = source_to_check(str(faulty / "train"), None, ["seed=3", "data.val_fraction=0.4"])
    again = open_source(faulty / "train", seed=3)
    assert len(source.val) == 16
    assert "chosen by seed 3" in source.note
    assert {*again.val.names()} <= {*source.val.names()}


def test_a_run_s_data_options_are_used(finished: Path, tiny_images: Path) -> None:
    assert source_to_check(str(tiny_images), finished, ["data.exclude=[red]"]).classes == ("blue", "green")


def test_a_table_that_fit_would_refuse_is_not_written(found: Findings, tmp_path: Path) -> None:
    every = {(place.split, place.row) for place in found.places if place.label == 0 and place.split == "train"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Findings, "left_out", lambda self, kinds: {"near": every})
        with pytest.raises(UserError, match="class 'blue' without an image to train on"):
            write_cleaned(found, tmp_path / "cleaned.csv", ["near"])
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_used_is_refused(faulty: Path, tmp_path: Path) -> None:
    source, page, table = open_source(faulty), tmp_path / "a.html", tmp_path / "a.csv"
    check_outputs(source, page, table, USUALLY)
    (tmp_path / "there.csv").touch()
    for given, said in (
        ((source, tmp_path / "a.txt", None, None), "ending in .html"),
        ((source, tmp_path / "no" / "a.html", None, None), "there is no folder"),
        ((source, page, None, ["near"]), "give that too"),
        ((source, page, table, ["nere"]), "did you mean 'near'"),
        ((source, page, tmp_path / "a.tsv", None), "ending in .csv"),
        ((source, page, tmp_path / "there.csv", None), "exists"),
        ((open_source("digits"), page, table, None), "no files of their own"),
    ):
        with pytest.raises(UserError, match=said):
            check_outputs(*given)
    with pytest.raises(UserError, match=r"takes data\.KEY=value and seed=N alone"):
        source_to_check(str(faulty), None, ["student.recipe.epochs=3"])
    with pytest.raises(UserError, match="no run directory"):
        source_to_check(str(faulty), tmp_path, [])
