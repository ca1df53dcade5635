"""Runs beside each other, of results and predictions that are made up."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import coadvise
from coadvise import UserError
from coadvise.cli import main
from coadvise.evaluation.scores import save_predictions
from coadvise.evaluation.verdict import paired_interval
from coadvise.runs.compare import Opened, _lead

LABELS = torch.arange(12) % 3


def made(finished: Path, folder: Path, advised: int, alone: int, names: list[str] | None = None) -> Path:
    """A run whose student is right about the first `advised` of 12 pictures, and alone about the first `alone`."""
    run = Path(shutil.copytree(finished, folder))
    for part, right in (("students/advised-0", advised), ("students/alone-0", alone)):
        logits = torch.eye(3)[(LABELS + (torch.arange(12) >= right)) % 3]
        tokens = ("class", "conv", "inv") if "advised" in part else ("class",)
        save_predictions(run, part, {token: logits.clone() for token in tokens}, LABELS)
    if names is not None:
        data = json.loads((run / "data.json").read_text())
        data["splits"]["val"]["paths"] = names
        (run / "data.json").write_text(json.dumps(data))
    return run


def test_differences_are_paired_where_the_pictures_are_the_same(finished: Path, tmp_path: Path) -> None:
    first, second = made(finished, tmp_path / "a", 9, 6), made(finished, tmp_path / "b", 11, 6)
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("smoothing: 0.1", "smoothing: 0.2"))
    found = coadvise.compare([first, second], tmp_path / "page.html")
    one, other = found["runs"]
    assert (one["top1"]["advised"], other["top1"]["advised"]) == pytest.approx((9 / 12, 11 / 12))
    hits = [(np.arange(12) < right).astype(float) for right in (11, 9)]
    wanted = paired_interval(hits[:1], hits[1:])
    assert other["differences"]["advised"] == pytest.approx(vars(wanted))
    assert other["differences"]["alone"]["mean"] == 0
    assert other["changes"] == ["augment.smoothing: 0.1 -> 0.2"]
    assert found["pooled"]["images"] == 12, "both score the same pictures, which count once"
    assert found["pooled"]["over_images"]["mean"] == pytest.approx((3 + 5) / 2 / 12)
    conv, inv = (one["top1"][f"teachers/{name}"] for name in ("conv", "inv"))
    lead = found["lead"]
    assert (lead["runs"], lead["images"]) == (2, 12)
    assert lead["over_runs"]["mean"] == pytest.approx(10 / 12 - max(conv, inv)) == lead["over_images"]["mean"]
    page = (tmp_path / "page.html").read_text()
    assert "augment.smoothing: 0.1 -&gt; 0.2" in page
    assert lead["sentence"] in page
    assert found["pooled"]["sentence"].split(":")[0] in page


def test_runs_of_other_pictures_are_pooled_and_not_paired(finished: Path, tmp_path: Path) -> None:
    first = made(finished, tmp_path / "a", 9, 6)
    other_names = [f"other/{number}.png" for number in range(12)]
    second = made(finished, tmp_path / "b", 12, 4, other_names)
    found = coadvise.compare([first, second])
    assert found["runs"][1]["differences"] == dict.fromkeys(found["runs"][1]["differences"])
    assert found["pooled"]["images"] == 24
    assert found["pooled"]["over_images"]["mean"] == pytest.approx((3 + 8) / 24)
    assert found["pooled"]["over_runs"]["mean"] == pytest.approx((3 / 12 + 8 / 12) / 2)
    assert found["pooled"]["top1"]["advised"] == pytest.approx((9 + 12) / 24)
    assert found["pooled"]["sentence"].endswith(" over runs.")


def test_a_copy_of_a_run_counts_once(finished: Path, tmp_path: Path) -> None:
    first, second = (made(finished, tmp_path / name, 9 + 2 * (name == "b"), 6) for name in "ab")
    copy = shutil.copytree(first, tmp_path / "copy")
    assert coadvise.compare([first, copy])["pooled"] is None
    assert coadvise.compare([first, second, copy])["pooled"] == coadvise.compare([first, second])["pooled"]


def test_it_is_printed_and_bad_input_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = made(finished, tmp_path / "a", 9, 6), made(finished, tmp_path / "b", 11, 6)
    monkeypatch.setattr(sys, "argv", ["coadvise", "compare", str(first), str(second)])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert (ended.value.code, lines[0].split()) == (0, ["images", "conv", "inv", "advised", "alone"])
    assert lines[2].split()[1:] == ["12", *lines[1].split()[2:4], "91.7%", "50.0%"]
    with pytest.raises(UserError, match="give two or more run directories"):
        coadvise.compare([first])
    with pytest.raises(UserError, match="is given twice"):
        coadvise.compare([first, second, first / ".." / "a"])
    with pytest.raises(UserError, match="is not a folder; create it"):
        coadvise.compare([first, second], tmp_path / "nowhere" / "page.html")
    shutil.move(second / "predictions", tmp_path / "kept")
    with pytest.raises(UserError, match="computes the predictions of"):
        coadvise.compare([first, second])
    shutil.move(tmp_path / "kept", second / "predictions")
    records = (second / "metrics.jsonl").read_text().splitlines()
    (second / "metrics.jsonl").write_text("\n".join(line for line in records if '"result"' not in line) + "\n")
    with pytest.raises(UserError, match="has no finished co-advised student yet"):
        coadvise.compare([first, second])


def test_the_probe_of_a_start_is_no_teacher(tmp_path: Path) -> None:
    hits = {name: np.arange(10) < right for name, right in (("teachers/conv", 6), ("start", 9), ("advised", 8))}
    names, labels = tuple(map(str, range(10))), np.zeros(10, np.int64)
    runs = [Opened(tmp_path, {n: h.astype(float) for n, h in hits.items()}, data, names, labels) for data in "ab"]
    lead = _lead(runs)
    assert lead is not None
    assert (lead["teacher"], lead["images"]) == ("teachers/conv", 20)
    assert lead["over_runs"]["mean"] == pytest.approx(0.2)
