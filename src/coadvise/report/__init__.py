"""The report of a run: one page that opens offline, `write_report(run)` writes it and everything else serves it."""

from coadvise.report.page import render, write_report

__all__ = ["render", "write_report"]
