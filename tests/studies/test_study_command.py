"""`coadvise study` as a user types it."""

import json
import sys
from pathlib import Path

import pytest
from studied import Studied

from coadvise.cli import main
from coadvise.errors import UserError
from coadvise.studies.runner import run_study


def test_a_study_by_its_options(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    val = str(studied.images / "val")

    def said(*words: str) -> tuple[int, str]:
        """Exit code and output of the program."""
        where = ("--data", str(studied.images), "--preset", studied.preset, "--out", str(studied.out))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["coadvise", "study", "knowledge", *where, *words])
            with pytest.raises(SystemExit) as stop:
                main()
        return int(stop.value.code or 0), capsys.readouterr().out

    code, out = said("--shift", val, "--json")
    assert code == 0
    assert [column["name"] for column in json.loads(out)["columns"]][-1] == val
    code, out = said("--dry-run")
    assert (code, out.count("done"), "--reuse" in out) == (0, 4, False)
    assert "--reuse" in said("--dry-run", "--reuse", str(studied.out))[1]
    assert said("--shift", "nowhere")[0] == 2


def test_a_run_is_no_place_for_a_study(studied: Studied) -> None:
    run = Path(studied.run("table7")[0]["rows"][0]["run"])
    with pytest.raises(UserError, match=r"is a run directory .*--reuse"):
        run_study("table7", studied.images, preset=studied.preset, out=run)
    assert not (run / "table7.json").exists()
