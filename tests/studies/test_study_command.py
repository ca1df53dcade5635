"""`coadvise study` as a user types it."""

import json
import sys
from pathlib import Path

import pytest
from studied import Studied

from coadvise.cli import main
from coadvise.errors import UserError
from coadvise.studies.runner import run_study


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["coadvise", *words])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0), *capsys.readouterr()


def test_a_study_by_its_options(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--data", str(studied.images), "--preset", studied.preset, "--out", str(studied.out))
    val = str(studied.images / "val")
    code, out, _ = said(capsys, "study", "teachers", *where, "--shift", val, "--json")
    assert code == 0
    assert [column["name"] for column in json.loads(out)["columns"]][-1] == val
    code, out, _ = said(capsys, "study", "teachers", *where, "--dry-run")
    assert code == 0
    assert out.count("done") == 2
    assert "--reuse" not in out
    code, out, _ = said(capsys, "study", "teachers", *where, "--dry-run", "--reuse", str(studied.out))
    assert "what --reuse would take is counted too" in out


def test_mistakes_are_named(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (("study", "token"), "unknown study 'token', did you mean 'tokens'?"),
        (("study", "teachers", "--data", str(studied.images), "--shift", "nowhere"), "folder 'nowhere' does not exist"),
    ):
        code, _, err = said(capsys, *words)
        assert code == 2
        assert sentence in err


def test_a_run_is_no_place_for_a_study(studied: Studied) -> None:
    run = Path(studied.run("tokens")[0]["rows"][0]["run"])
    with pytest.raises(
        UserError, match=r"is a run directory of 'coadvise fit'; choose another --out, or give it as --reuse"
    ):
        run_study("tokens", studied.images, studied.preset, out=run)
    assert not (run / "tokens.json").exists()
