"""Assembles the page and writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from coadvise.report.classes import agreements, class_gains
from coadvise.report.curves import learning
from coadvise.report.disagreement import disagreements
from coadvise.report.document import document
from coadvise.report.markup import Markup, tag
from coadvise.report.provenance import again_section, data_section
from coadvise.report.read import Run, read_run
from coadvise.report.verdict import comparison, headline

SECTIONS: tuple[tuple[str, str, str, Callable[[Run], Markup]], ...] = (
    ("compare", "Compare", "How does the student compare with its teachers?", comparison),
    ("learning", "Learning", "How did each network learn?", learning),
    ("classes", "Classes", "Which classes gained?", class_gains),
    ("advice", "Advice", "Which teacher does the student follow when they disagree?", disagreements),
    ("agreement", "Agreement", "Which predictions agree?", agreements),
    ("data", "Data", "Which data was used?", data_section),
    ("again", "Reproduce", "How can I reproduce this run?", again_section),
)
SOURCES = "Made from config.yaml, data.json, metrics.jsonl and predictions/ of the run, and from the images shown."


def write_report(
    run: Path,
    picture: Callable[[int], bytes] | None = None,
    attention: Callable[[int], Mapping[str, bytes]] | None = None,
) -> Path:
    """Writes `run/report.html` from the files of the run directory. Returns its path.

    The file is replaced atomically, so a reader sees the old page or the new one. The page of an unfinished run says
    what is missing.

    Args:
        run: the run directory.
        picture: returns the encoded validation image of a row of the predictions, or raises. Without it the page has
            no thumbnails, and says so.
        attention: returns the same by token of the first co-advised student, dark where it does not look.

    Raises:
        ValueError: `run` is not a directory.
    """
    page = render(replace(read_run(run), picture=picture, attention=attention))
    target = run / "report.html"
    beside = run / f".report.{os.getpid()}.html"
    try:
        with beside.open("wb") as file:
            file.write(page.encode("utf-8", errors="backslashreplace"))  # a file name may not be valid Unicode
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def render(run: Run) -> str:
    """The whole page as one string."""
    name = run.path.resolve().name
    top = (_origin(run, name), headline(run), _faults(run))
    sections = [(anchor, short, title, make(run)) for anchor, short, title, make in SECTIONS]
    return document(f"{name} · coadvise report", top, sections, SOURCES)


def _origin(run: Run, name: str) -> Markup:
    record = run.last("run")
    begun = run.begun.replace("T", " ").replace("+00:00", " UTC")
    facts = [fact for fact in (begun, str(record.get("device") or "")) if fact]
    return tag("p", tag("b", name), *(f" · {fact}" for fact in facts), class_="origin")


def _faults(run: Run) -> Markup:
    if not run.faults:
        return Markup()
    faults = tag("ul", *(tag("li", fault) for fault in run.faults))
    return tag("div", tag("b", "Some files could not be read"), faults, class_="faults", role="note")
