import re
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from coadvise import terminal as terminal_module
from coadvise.terminal import Terminal, shown


@given(st.text())
def test_what_is_shown_is_one_line_that_a_terminal_does_not_obey(text: str) -> None:
    seen = shown(text)
    assert seen.isprintable()
    seen.encode()  # no half of a surrogate pair is left, as names of other bytes have
    assert text != seen or text.isprintable()


@pytest.mark.parametrize("width", [80, 200])  # the rate takes more or less room between these
def test_on_a_terminal_there_is_a_bar_for_each_network(width: int) -> None:
    screen = StringIO()
    terminal = Terminal(Console(file=screen, force_terminal=True, width=width, color_system=None))
    terminal.progress("students/advised-0", 9993, 9994, {})  # resumed: begins there
    terminal.progress(
        "students/advised-0", 9994, 9994, {"total": 0.5, "class": 0.5, "conv": 22.5, "inv": 0.5, "top1": 0.25}
    )
    terminal.progress("students/alone-0", 1, 4, {})
    terminal.say("a [bracketed] word")
    terminal.bars.stop()
    shown = screen.getvalue()
    assert "students/advised-0" in shown
    assert "9994/9994" in shown
    assert "top1 0.250" in shown
    assert ("inv 0.500" in shown) == (width == 200), "what does not fit is cut off at the end"
    lines = [re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]", shown)]
    assert max(map(len, lines)) <= width
    assert all("-:--" in line or "0:00:00" in line for line in lines if "━" in line), "nothing else is"
    assert "a [bracketed] word" in shown


def test_in_a_file_a_network_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(terminal_module.time, "monotonic", lambda: now)
    file = StringIO()
    terminal = Terminal(Console(file=file, width=40))
    for step in range(501, 601):  # resumed after step 500, 10 s a step
        terminal.progress("students/advised-0", step, 600, {"class": 1.5, "top1": 0.25} if step == 510 else {})
        terminal.progress("teachers/conv", 1, 50, {})  # the first of it, and then no more
        now += 10.0
    terminal.close()
    assert file.getvalue().splitlines() == [
        "students/advised-0: 531 of 600, about 12 min left, top1 0.250 class 1.500",
        "students/advised-0: 561 of 600, about 6 min left, top1 0.250 class 1.500",
        "students/advised-0: 591 of 600, about 2 min left, top1 0.250 class 1.500",
    ]
