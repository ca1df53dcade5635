"""Each study is the paper's table: its rows in its order, its figures, and claims that its text makes."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from paper_tables import COLUMNS, CONTRADICTED, DATA, TABLES

from coadvise.studies import STUDIES, Claim, Study
from coadvise.studies.question import SIMILAR
from coadvise.studies.result import HELD, NOT_HELD, NOT_JUDGED, judged

PAPER = os.environ.get("COADVISE_PAPER", "")
CLAIMS = [(name, claim) for name, study in STUDIES.items() for claim in study.claims]


@pytest.mark.parametrize("name", TABLES)
def test_rows_and_figures_are_the_paper_s(name: str) -> None:
    study = STUDIES[name].described()
    rows = [(row["name"], row["paper"]) for row in study["rows"] if not row["beyond"]]
    assert rows == [(row, dict(zip(COLUMNS[name], figures, strict=True))) for row, figures in TABLES[name]]
    assert study["paper_data"] == DATA[name]
    assert not [row for row in study["rows"] if row["beyond"] and row["paper"]]
    sections = {"1", "1, Figure 1", "3.1", "4.2", "4.3.2", "4.3.3", "4.3.4", "4.4"}
    assert {claim["section"] for claim in study["claims"]} <= sections


def test_what_the_paper_gives_no_figures_of_has_none() -> None:
    for name in STUDIES.keys() - TABLES.keys():
        assert not [row for row in STUDIES[name].rows if row.paper]


@pytest.mark.skipif(not Path(PAPER).is_file(), reason="COADVISE_PAPER does not name the paper's text")
@pytest.mark.parametrize("name", TABLES)
def test_the_fixture_is_the_page(name: str) -> None:
    rest = Path(PAPER).read_text().partition(f"\nTable {name[-1]}. ")[2]
    table = re.search(r"((?:^\|.*\n)+)", rest, re.MULTILINE)
    assert table
    found = []
    for line in table[1].splitlines():
        cells = [cell.strip().removesuffix("M") for cell in line.split("|")]
        if numbers := [float(cell) for cell in cells if re.fullmatch(r"\d+(\.\d+)?", cell)]:
            found.append(tuple(numbers[-len(COLUMNS[name]) :]))
    assert found == [figures for _, figures in TABLES[name]]


@pytest.mark.parametrize(("name", "claim"), CLAIMS)
def test_the_paper_s_figures_bear_its_claims_out(name: str, claim: Claim) -> None:
    study = STUDIES[name]
    said = judged(claim, study, {column.name: {row.name: {} for row in study.rows} for column in study.columns})
    assert (said["finding"], said["difference"]) == (NOT_JUDGED, None)
    if name not in TABLES:
        assert said["paper"] is None
    elif any((name, claim.text.startswith(text)) == (table, True) for table, text in CONTRADICTED):
        assert said["paper"] < 0
    elif claim.kind == "similar":
        assert abs(said["paper"]) < 100 * SIMILAR
    else:
        assert said["paper"] > 0


def test_every_contradiction_names_a_claim() -> None:
    for name, text in CONTRADICTED:
        assert [claim for claim in STUDIES[name].claims if claim.text.startswith(text)]


def finding(study: Study, claim: Claim, size: float) -> str:
    """How a claim is judged if its weighted sum is `size` on every image, as far as images can have it."""
    equal = {row.name: {seed: np.zeros(500) for seed in (0, 1, 2)} for row in study.rows}
    values = {column.name: dict(equal) for column in study.columns}
    weights = judged(claim, study, values)["rows"]
    first = next(row for row, weight in weights.items() if weight > 0)
    noise = np.random.default_rng(0).normal(0, 1e-3, (3, 500))
    values[claim.column][first] = {seed: size / weights[first] + noise[seed] for seed in (0, 1, 2)}
    return str(judged(claim, study, values)["finding"])


@pytest.mark.parametrize(("name", "claim"), CLAIMS)
def test_every_claim_can_hold_and_can_fail(name: str, claim: Claim) -> None:
    holds, fails = {"above": (0.1, -0.1), "similar": (0.0, 0.1), "differ": (0.1, 0.0)}[claim.kind]
    assert finding(STUDIES[name], claim, holds) == HELD
    assert finding(STUDIES[name], claim, fails) == NOT_HELD


def test_the_description_is_plain_json() -> None:
    for study in STUDIES.values():
        described = json.loads(json.dumps(study.described()))
        assert described.keys() == {"title", "paper_data", "rows", "claims"}
        assert all(isinstance(figure, int | float) for row in described["rows"] for figure in row["paper"].values())
