"""What every token and teacher says of images, as a table."""

import csv
from pathlib import Path

import pytest

from coadvise.deploy.opinions import write_opinions
from coadvise.deploy.publish import load
from coadvise.errors import UserError


def test_a_table_has_every_token_s_and_teacher_s_opinion(finished: Path, tiny_images: Path, tmp_path: Path) -> None:
    paths = sorted((tiny_images / "val").rglob("*.png"))
    write_opinions(load(finished), finished, paths, tmp_path / "out.csv")
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["image"] for row in rows] == list(map(str, paths))
    student = load(finished)
    opinions = {answer: student.predict(paths, answer) for answer in ("class", "conv", "inv", "average")}
    opinions |= {f"teachers/{name}": load(finished, f"teachers/{name}").predict(paths) for name in ("conv", "inv")}
    for name, predictions in opinions.items():
        assert [row[name] for row in rows] == [prediction.label for prediction in predictions]
        shares = [float(row[f"{name} probability"]) for row in rows]
        assert shares == pytest.approx([prediction.probability for prediction in predictions], abs=1e-4)
    with pytest.raises(UserError, match="is not a folder; create it"):
        write_opinions(load(finished), finished, paths, tmp_path / "nowhere" / "out.csv")
