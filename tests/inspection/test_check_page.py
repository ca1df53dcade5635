"""The page: self-contained, with thumbnails and reasons; names are text, whatever they contain."""

import re
from dataclasses import replace

from coadvise.inspection import page
from coadvise.inspection.findings import Findings


def test_the_page_shows_faults_with_pictures_and_reasons(found: Findings) -> None:
    text = page.render(found)
    for piece in (*found.sentences(), "Identical files under two labels (1)", "in several splits (1)", "broken.png"):
        assert piece.replace("'", "&#39;") in text
    first = found.doubts.suspects[0]
    assert found.reason(first)[1:].replace("'", "&#39;") in text
    assert text.count("<img ") == 2 + 2 + 2 + 2 + len(found.doubts.suspects)  # two labels stand in both sections
    assert not re.search(r'(src|href)="(?!data:image/|#)', text), "nothing is loaded"
    assert "train/blue/0.png" in text
    assert "36 × 36, JPEG" in text


def test_names_are_text(found: Findings) -> None:
    source = replace(found.pictures.source, classes=("<b>blue</b>", "green", "red"), where="/data/<i>")
    text = page.render(replace(found, pictures=replace(found.pictures, source=source)))
    assert "<b>blue" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;blue" in text


def test_what_is_too_much_for_a_page_is_counted(found: Findings, monkeypatch) -> None:
    monkeypatch.setattr(page, "MOST_CARDS", 1)
    monkeypatch.setattr(page, "MOST_COPIES", 1)
    monkeypatch.setattr(page, "MOST_CLASSES", 2)
    doubts = replace(found.doubts, suspects=(0, 1, 2))
    text = page.render(replace(found, doubts=doubts))
    assert "The first 1 of 3; --json lists all." in text
    assert "and 1 more" in text
    assert "The 1 largest and smallest of 3 classes." in text


def test_data_without_copies_says_so(found: Findings) -> None:
    assert "No two files are the same" in page.render(replace(found, exact=(), near=()))
