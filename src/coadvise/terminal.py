"""What a run says and how far it is, on a terminal or in a file."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

LOG_EVERY = 300.0  # seconds from one line of a network in a file to the next


def shown(text: str) -> str:
    """Text of any origin in one line a terminal shows and does not obey: file and class names may hold anything."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _in_words(figures: Mapping[str, float]) -> str:
    """Losses and accuracy, which comes first."""
    ordered = sorted(figures.items(), key=lambda item: item[0] != "top1")
    return " ".join(f"{name} {value:.3f}" for name, value in ordered)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} steps/s" if task.speed else "")


class _Figures(ProgressColumn):
    """Is cut off where the terminal is narrow, so that all else is seen."""

    def render(self, task: Task) -> Text:
        return Text(_in_words(task.fields["figures"]), no_wrap=True, overflow="ellipsis")


@dataclass
class _Part:
    """A network that tells a file how far it is: since when it is seen, from which step on, and when it spoke last."""

    began: float
    first: int
    spoke: float
    figures: Mapping[str, float] = field(default_factory=dict)


class Terminal:
    """Shows a run: sentences, and for each network its steps, time left and latest figures.

    On a terminal these are a bar; elsewhere, in a log file, a line now and then.
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
            self._now_and_then(part, done, total, figures)

    def close(self) -> None:
        """Gives the cursor back where bars still have it."""
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

    def _now_and_then(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        own = self.parts.setdefault(part, _Part(now, done, now))
        own.figures = figures or own.figures
        if done == total:
            del self.parts[part]
        elif now - own.spoke >= LOG_EVERY and done > own.first:
            own.spoke = now
            left = (now - own.began) / (done - own.first) * (total - done) / 60
            words = [f"{part}: {done} of {total}", f"about {left:.0f} min left", _in_words(own.figures)]
            self.say(", ".join(filter(None, words)))
