"""Messages and progress of a run, on a terminal or in a log file."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

LOG_EVERY = 300.0  # seconds between two lines of a network in a log file


def shown(text: str) -> str:
    """One printable line: control characters, which a file or class name may contain, are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _describe(figures: Mapping[str, float]) -> str:
    """Accuracy, then losses."""
    ordered = sorted(figures.items(), key=lambda item: item[0] != "top1")
    return " ".join(f"{name} {value:.3f}" for name, value in ordered)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class _Figures(ProgressColumn):
    """Truncated on a narrow terminal, so that the other columns stay visible."""

    def render(self, task: Task) -> Text:
        return Text(_describe(task.fields["figures"]), no_wrap=True, overflow="ellipsis")


@dataclass
class _Part:
    """The progress of a network in a log file; times in seconds.

    Attributes:
        began, first: time and step of its first report, which is not step 0 after a resume.
        logged: time of its last line.
    """

    began: float
    first: int
    logged: float
    figures: Mapping[str, float] = field(default_factory=dict)


class Terminal:
    """Shows a run: messages, and for each network its steps, time left and latest figures.

    On a terminal each network has a bar; in a log file, a line every `LOG_EVERY` seconds.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        whole = Column(no_wrap=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(10 if console.width < 140 else 40, table_column=whole),
            MofNCompleteColumn(table_column=whole), _Rate(table_column=whole), TimeRemainingColumn(table_column=whole),
            _Figures(),
        )  # fmt: skip
        self.bars = Progress(*columns, console=console)
        self.tasks: dict[str, Any] = {}
        self.parts: dict[str, _Part] = {}

    def say(self, text: str) -> None:
        self.console.print(shown(text), markup=False, highlight=False, soft_wrap=True)

    def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if self.console.is_terminal:
            self._move_bar(part, done, total, figures)
        else:
            self._log(part, done, total, figures)

    def close(self) -> None:
        """Stops the bars, which gives the cursor back."""
        if self.tasks:
            self.bars.stop()

    def _move_bar(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if part not in self.tasks:
            if not self.tasks:
                self.bars.start()
            self.tasks[part] = self.bars.add_task(part, total=total, completed=done - 1, figures={})
        self.bars.update(self.tasks[part], completed=done)
        if figures:
            self.bars.update(self.tasks[part], figures=figures)
        if done == total:
            self.bars.refresh()
            if len(self.tasks) == 1:
                self.bars.stop()
            self.bars.remove_task(self.tasks.pop(part))

    def _log(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        own = self.parts.setdefault(part, _Part(now, done, now))
        own.figures = figures or own.figures
        if done == total:
            del self.parts[part]
        elif now - own.logged >= LOG_EVERY and done > own.first:
            own.logged = now
            left = (now - own.began) / (done - own.first) * (total - done) / 60
            words = [f"{part}: {done} of {total}", f"about {left:.0f} min left", _describe(own.figures)]
            self.say(", ".join(filter(None, words)))
