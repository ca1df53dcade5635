"""Puts the page together and writes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

from coadvise.report.classes import agreements, class_gains
from coadvise.report.curves import learning
from coadvise.report.disagreement import disagreements
from coadvise.report.markup import Markup, tag
from coadvise.report.provenance import again_section, data_section
from coadvise.report.read import Run, read_run
from coadvise.report.verdict import comparison, headline

SECTIONS: tuple[tuple[str, str, str, Callable[[Run], Markup]], ...] = (
    ("compare", "Compare", "How does it compare with its teachers?", comparison),
    ("learning", "Learning", "How did each model learn?", learning),
    ("classes", "Classes", "Which classes gained?", class_gains),
    ("advice", "Advice", "When the teachers disagree, whom does the student follow?", disagreements),
    ("agreement", "Agreement", "Who answers alike?", agreements),
    ("data", "Data", "What was it trained on?", data_section),
    ("again", "Reproduce", "How can this be run again?", again_section),
)
# Nothing is loaded from anywhere, whatever a name in the run may hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(run: Path, picture: Callable[[int], bytes] | None = None) -> Path:
    """Writes `run/report.html` from what the run directory holds and returns its path.

    The file is replaced in one step, so a reader sees the old page or the new one. A run that is still going or was
    interrupted gets a page that says what is missing.

    Args:
        run: the run directory.
        picture: gives the encoded validation image of a row of the predictions, or raises. None: thumbnails are left
            out, and a line says so.

    Raises:
        ValueError: `run` is not a directory.
    """
    page = render(replace(read_run(run), picture=picture))
    target = run / "report.html"
    beside = run / f".report.{os.getpid()}.html"
    try:
        with beside.open("wb") as file:
            file.write(page.encode("utf-8", errors="backslashreplace"))  # a file name need not be Unicode
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def render(run: Run) -> str:
    """The whole page as one string."""
    name = run.path.resolve().name
    style = Markup(resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name} · coadvise report"),
        tag("style", style),
    )
    links = (tag("a", short, href=f"#{anchor}") for anchor, short, _, _ in SECTIONS)
    body = tag(
        "body",
        tag("header", _origin(run, name), headline(run), _faults(run), tag("nav", *links), class_="top"),
        tag("main", *(tag("section", tag("h2", title), make(run), id=anchor) for anchor, _, title, make in SECTIONS)),
        tag(
            "footer",
            "Made from config.yaml, data.json, metrics.jsonl and predictions/ of the run, and the pictures shown.",
        ),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _origin(run: Run, name: str) -> Markup:
    record = run.last("run")
    begun = run.begun.replace("T", " ").replace("+00:00", " UTC")
    facts = [fact for fact in (begun, str(record.get("device") or "")) if fact]
    return tag("p", tag("b", name), *(f" · {fact}" for fact in facts), class_="origin")


def _faults(run: Run) -> Markup:
    if not run.faults:
        return Markup()
    return tag(
        "div",
        tag("b", "Not everything could be read"),
        tag("ul", *(tag("li", f) for f in run.faults)),
        class_="faults",
        role="note",
    )
