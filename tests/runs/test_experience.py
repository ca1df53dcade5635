import json
import shutil
from pathlib import Path

import pytest
from tiny import Stopper, never

from coadvise import fit
from coadvise.config.reading import read_config
from coadvise.runs import experience
from coadvise.runs.experience import GAINS, expectation
from coadvise.training.metrics import read_records

CLASSES = {"digits": 10, "clothing": 17, "trashnet": 6, "cifar10": 10}
RESULTS = Path(__file__).parents[2] / "results"


OF_RUNS = [gain for gain in GAINS if (RESULTS / gain.record / "metrics.jsonl").exists()]
OF_A_STUDY = [gain for gain in GAINS if gain not in OF_RUNS]


@pytest.mark.parametrize("gain", OF_A_STUDY, ids=lambda gain: str(gain.pictures))
def test_what_advice_gained_is_what_the_study_found(gain: tuple[str, int, float]) -> None:
    record, pictures, points = gain
    rows = json.loads((RESULTS / record / "gain.json").read_text())["rows"]
    (found,) = (row for row in rows if row["name"] == f"{pictures} a class, the preset's epochs, co-advised")
    assert points == round(100 * found["figures"]["gain"]["mean"], 1)


@pytest.mark.parametrize("gain", OF_RUNS, ids=lambda gain: gain.record)
def test_what_advice_gained_is_what_the_record_says(gain: tuple[str, int, float]) -> None:
    record, pictures, points = gain
    records = read_records(RESULTS / record)
    (verdict,) = [r for r in records if r["kind"] == "verdict"][-1:]
    assert points == round(100 * verdict["difference"]["mean"], 1)
    line = next(r for r in records if r["kind"] == "train" and r["part"].startswith("students"))
    batch = read_config(RESULTS / record / "config.yaml").student.recipe.batch_size
    steps = line["step"] / line["epoch"]  # what does not fill a last batch of an epoch is left out of it
    classes = next(number for name, number in CLASSES.items() if record.startswith(name))
    assert steps * batch <= pictures * classes < (steps + 1) * batch + classes


def test_the_expectation_is_of_runs_with_about_as_many_pictures() -> None:
    assert expectation([300] * 6) == "with about 300 images a class, advice gained 3.8 to 6.6 points in 6 runs of ours"
    assert expectation([20, 40]) == "with about 30 images a class, advice gained 2 to 3.7 points in 3 runs of ours"
    assert expectation([1300] * 1000) is None
    assert expectation([5, 5]) is None


def test_fit_says_it_before_it_trains(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experience, "LIKE", 1000)
    listener = Stopper(never)
    fit(tiny_images, tiny_preset, shutil.copytree(finished, tmp_path / "run"), baseline=True, listener=listener)
    assert any("images a class, advice gained 2 to 9.9 points in 11 runs of ours" in line for line in listener.said)
