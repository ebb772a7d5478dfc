"""What of a rendered template its author wrote: the rest is data, which must not speak as a control token."""

from __future__ import annotations

import re
from typing import Any

from promptmill.types import Span

#: What control tokens look like (``<|im_end|>``, ``[INST]``). Templates without any need no second look.
CONTROL = re.compile(r"<[^\s<>]{1,80}>|\[[^\s\[\]]{1,40}\]")

#: Characters that Unicode gives no meaning, around each value that a template writes.
START, END = "\uf8fd", "\uf8fe"


def marked(value: Any) -> str:
    """A value as a template writes it, between its marks."""
    return f"{START}{value}{END}"


def own_spans(text: str, with_marks: str) -> tuple[Span, ...]:
    """The spans of ``text`` that are no value; none where the marks have changed what was written."""
    spans, start, depth, at = [], 0, 0, 0
    for character in re.split(f"([{START}{END}])", with_marks):
        if character == START:
            if depth == 0:
                spans.append((start, at))
            depth += 1
        elif character == END:
            depth -= 1
            start = at
        else:
            at += len(character)
    spans.append((start, at))
    is_same = depth == 0 and with_marks.replace(START, "").replace(END, "") == text
    return tuple((low, high) for low, high in spans if low < high) if is_same else ()


def moved(spans: tuple[Span, ...], by: int) -> tuple[Span, ...]:
    """The same spans of a text that follows ``by`` characters."""
    return tuple((start + by, end + by) for start, end in spans)
