"""The verdict's rows and lines, of results and predictions that are made up."""

import shutil
import statistics
from collections import UserList
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Stopper, never, records

from coadvise.config import read_config
from coadvise.evaluation.scores import save_predictions
from coadvise.runs.conclude import _hits, _rows, conclude, verdict_table
from coadvise.runs.plan import ADVISED, ALONE, TEACHER, Part, run_parts
from coadvise.runs.run import Run
from coadvise.training.engine import Engine
from coadvise.training.listener import Silent
from coadvise.training.metrics import Recorder

TEACHERS = [Part(f"teachers/{name}", TEACHER, 0, name) for name in ("conv", "inv")]
STUDENTS = [Part(f"students/{role}-{seed}", role, seed) for seed in (0, 1, 2) for role in (ADVISED, ALONE)]
ADVISED_TOP1, ALONE_TOP1, AVERAGE_TOP1 = (0.5, 0.6, 0.79), (0.4, 0.41, 0.3), (0.7, 0.8, 0.6)


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    """The rows by name, of three seeds; the conv token has an answer in the first two."""
    results: dict[str, dict[str, Any]] = {
        "teachers/conv": {"parameters": 2_000_000, "top1": {"class": 0.9}},
        "teachers/inv": {"parameters": 3_000_000, "top1": {"class": 0.8}},
    }
    for seed in (0, 1, 2):
        tops = {"class": ADVISED_TOP1[seed], "average": AVERAGE_TOP1[seed]} | ({"conv": 0.1} if seed < 2 else {})
        results[f"students/advised-{seed}"] = {"parameters": 1_250_000, "top1": dict(sorted(tops.items()))}
        results[f"students/alone-{seed}"] = {"parameters": 1_200_000, "top1": {"class": ALONE_TOP1[seed]}}
    speeds = {part: 100.0 * n**2 for n, part in enumerate(results)}
    found = _rows([*TEACHERS, *STUDENTS], results, speeds, {"class": {"mean": 0.26, "low": 0.2, "high": 0.32}})
    return {row["name"]: row for row in found}


def test_a_row_has_the_mean_over_seeds_and_the_spread(rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == ["conv teacher", "involution teacher", "student alone", *(
        f"student co-advised ({answer})" for answer in ("average", "class token")
    )]  # fmt: skip
    for name, values in (
        ("student alone", ALONE_TOP1),
        ("student co-advised (class token)", ADVISED_TOP1),
        ("student co-advised (average)", AVERAGE_TOP1),
    ):
        assert rows[name]["top1"] == pytest.approx(statistics.mean(values))
        assert rows[name]["spread"] == pytest.approx(statistics.stdev(values))
    assert (rows["conv teacher"]["top1"], rows["conv teacher"]["spread"]) == (0.9, None)
    assert [row["parameters"] for row in rows.values()] == [2e6, 3e6, 1.2e6, 1.25e6, 1.25e6]
    assert rows["student alone"]["images_per_second"] == 100 * 5**2, "the median"
    assert [row["difference"] is None for row in rows.values()] == [True, True, True, True, False]


def test_the_table_is_in_points_and_millions(rows: dict[str, dict[str, Any]]) -> None:
    *_, advised = (line.split() for line in verdict_table(list(rows.values())))
    assert advised[2:] == ["(class", "token)", "63.0%", "14.7", "+26.0", "±", "6.0", "1.25", "M", "1600"]


def test_answers_that_a_seed_lacks_are_not_compared() -> None:
    labels, right, wrong = torch.tensor([0, 1]), torch.eye(2), 1 - torch.eye(2)
    predictions = {
        "students/advised-0": ({"class": right}, labels),
        "students/advised-1": ({"class": wrong, "conv": right}, labels),
        "students/alone-0": ({"class": wrong}, labels),
    }
    parts = [part for part in STUDENTS if part.name in predictions]
    hits = {
        answer: {seed: h.tolist() for seed, h in of.items()}
        for answer, of in _hits(parts, ADVISED, predictions).items()
    }
    assert hits == {"class": {0: [True, True], 1: [False, False]}}


def test_the_sentence_is_of_the_class_token_and_the_remark_of_the_best_teacher(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    dataset: Any = SimpleNamespace(val=val)
    record, listener = Recorder(folder, True, Silent().say), Stopper(never)
    conclude(Run(folder, config, dataset, Engine(config.engine), record, listener), parts)
    verdict = records(folder, "verdict")[-1]
    assert "+50.0 points (95 %" in verdict["sentence"]
    assert "60 test images" in verdict["sentence"]
    assert "conv teacher is more accurate than the co-advised student: +28.3 points" in verdict["remark"]
    assert verdict["difference"]["mean"] == pytest.approx(0.5)
    differences = {row["answer"]: row["difference"]["mean"] for row in verdict["rows"] if row["difference"]}
    assert differences == pytest.approx(dict.fromkeys(("conv", "inv", "average"), -1 / 6) | {"class": 0.5})
    assert verdict["sentence"] in listener.said
