"""The verdict's rows and lines, of results and predictions that are made up."""

import shutil
from collections import UserList
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Stopper, never, records

from coadvise.config.reading import read_config
from coadvise.evaluation.scores import load_predictions, save_predictions
from coadvise.runs.conclude import conclude
from coadvise.runs.plan import run_parts
from coadvise.runs.run import Run
from coadvise.training.engine import Engine
from coadvise.training.listener import Silent
from coadvise.training.metrics import Recorder


@pytest.mark.parametrize("sizes", [7, 6])
def test_the_sentence_is_of_the_class_token_and_the_remark_of_the_best_teacher(
    sizes: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    config = read_config(folder / "config.yaml")
    parts, labels = run_parts(config, 1, True), torch.arange(60) % 3
    right = {"teachers/conv": 57, "teachers/inv": 30, "students/advised-0": 40, "students/alone-0": 10}
    for part, count in right.items():
        logits = {"class": torch.eye(3)[(labels + (torch.arange(60) >= count)) % 3]}
        if part == "students/advised-0":  # so that no average is right
            logits |= {token: 9 * torch.eye(3)[(labels + 1) % 3] for token in ("conv", "inv")}
        save_predictions(folder, part, logits, labels)
    monkeypatch.setattr("coadvise.runs.conclude.images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
    val: Any = UserList(labels)
    val.read = lambda row: b"no image"
    val.still = lambda row, size: np.full((3, size, size), row, np.uint8)
    train = SimpleNamespace(per_class=lambda classes: [20, 20, sizes])
    dataset: Any = SimpleNamespace(scored=val, train=train, classes=("a", "b", "c"))
    record, listener = Recorder(folder, True, Silent().say), Stopper(never)
    conclude(Run(folder, config, dataset, Engine(config.engine), record, listener), parts)
    verdict = records(folder, "verdict")[-1]
    assert "+50.0 points (95 %" in verdict["sentence"]
    assert "60 test images" in verdict["sentence"]
    assert "conv teacher is more accurate than the co-advised student: +28.3 points" in verdict["remark"]
    assert verdict["difference"]["mean"] == pytest.approx(0.5)
    differences = {row["answer"]: row["difference"]["mean"] for row in verdict["rows"] if row["difference"]}
    assert differences == pytest.approx(dict.fromkeys(("conv", "inv", "average"), -1 / 6) | {"class": 0.5})
    rows = {row["name"]: row for row in verdict["rows"]}
    both = rows["average of the teachers"]
    answers = torch.stack([load_predictions(folder, f"teachers/{name}")[0]["class"] for name in ("conv", "inv")])
    right_together = (answers.softmax(-1).mean(0).argmax(-1) == labels).float().mean().item()
    assert both["top1"] == pytest.approx(right_together)
    assert both["parameters"] == rows["conv teacher"]["parameters"] + rows["involution teacher"]["parameters"]
    (line,) = (line for line in listener.said if line.startswith("average of the teachers"))
    assert line.endswith(" 0"), "images/s, rounded from a half: one after the other"
    assert "average of the teachers" in (folder / "report.html").read_text()
    assert verdict["sentence"] in listener.said
    unbalanced = sizes < 7  # more than three times as many images of another class
    assert ("By macro accuracy" in verdict["sentence"]) == unbalanced
    assert ("macro" in listener.said[0]) == unbalanced
    assert (">macro<" in (folder / "report.html").read_text()) == unbalanced
    if unbalanced:  # 40 and 10 of 60 are right, 14, 13 and 13 and 4, 3 and 3 of 20 each
        assert verdict["macro_difference"]["mean"] == pytest.approx(0.5)
