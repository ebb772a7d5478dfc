"""What a terminal is spared, and what spreadsheets are."""

from __future__ import annotations

import io

import pytest

from promptmill.core.terminal import for_people, printable
from promptmill.store.spreadsheets import inert

#: Clipboard, title, screen, link, a C1 introducer, an override of the direction, a return that hides what was before.
HOSTILE = "a\x1b]52;c;aGk=\x07b\x1b]0;t\x07c\x1b[2Jd\x1b]8;;http://x\x1b\\e\x9b31mf\u202eg\rh\x08\x7f"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_characters_but_the_ends_of_lines_and_tabs() -> None:
    terminal = Terminal()
    stream = for_people(for_people(terminal))
    stream.write(f"{HOSTILE}\n\t世界 é 🙂")
    assert terminal.getvalue() == printable(f"{HOSTILE}\n\t世界 é 🙂")
    assert not set(terminal.getvalue()) & {*map(chr, range(9)), "\x1b", "\x07", "\x9b", "\r", "\x08", "\x7f", "\u202e"}
    assert terminal.getvalue().endswith("\n\t世界 é 🙂")


def test_a_file_gets_every_character() -> None:
    file = io.StringIO()
    for_people(file).write(HOSTILE)
    assert file.getvalue() == HOSTILE


@pytest.mark.parametrize(
    "cell", ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", "-", "- item", "+49 30 1"]
)
def test_a_text_that_a_spreadsheet_would_run_is_marked(cell: str) -> None:
    assert inert([cell]) == [f"'{cell}"]


@pytest.mark.parametrize(
    "cell", ["-5", "+1.5", "-.5", "-1e-9", "-inf", "-3 %", -5, 1.5, None, True, "", "a=1", "'=1", " x"]
)
def test_numbers_and_other_texts_stay(cell: object) -> None:
    assert inert([cell]) == [cell]
