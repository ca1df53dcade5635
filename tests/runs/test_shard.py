"""`coadvise shard` as a user types it."""

import json
import sys
from pathlib import Path

import pytest

from coadvise.cli import main
from coadvise.data.sources import open_source


def test_the_command_writes_shards_and_says_how_to_use_them(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["coadvise", "shard", str(tiny_images), "--out", str(tmp_path / "out"), "--megabytes", "0.02"]
    monkeypatch.setattr(sys, "argv", words)
    main_ends(0)
    assert f"use them as shards:{tmp_path / 'out'}\n" in capsys.readouterr().out
    source = open_source(f"shards:{tmp_path / 'out'}")
    assert (len(source.train), len(source.val)) == (24, 12)
    monkeypatch.setattr(sys, "argv", [*words, "--json", "data.exclude=[red]"])
    main_ends(2)
    assert "holds shards with another data behind them; give another --out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    main_ends(0)
    done = json.loads(capsys.readouterr().out)
    assert (done["made"], done["missing"]) == (0, 0)
    assert done["shards"] == len([*tmp_path.rglob("*.tar")]) > 2


def main_ends(code: int) -> None:
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0) == code
