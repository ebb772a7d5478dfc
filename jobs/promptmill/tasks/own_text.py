"""What of a rendered template its author wrote: the rest is data, which must not speak as a control token."""

from __future__ import annotations

import re
from collections.abc import Iterator

from promptmill.types import Span

#: What control tokens look like (``<|im_end|>``, ``[INST]``). Templates without any need no second look.
CONTROL = re.compile(r"<[^\s<>]{1,80}>|\[[^\s\[\]]{1,40}\]")

#: Characters that Unicode gives no meaning: any of them may still be in a user's text.
PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


def unused_marks(text: str) -> Iterator[str]:
    """Characters without a meaning that are not in ``text``, which can be marked with them and then told apart."""
    used = set(text)
    return (mark for mark in map(chr, PRIVATE) if mark not in used)


def own_spans(text: str, with_marks: str, begin: str, end: str) -> tuple[Span, ...]:
    """The spans of ``text`` that are no value; none where the marks have changed what was written.

    ``with_marks``: the same with ``begin`` and ``end`` around each value that the template writes.
    """
    spans, start, depth, at = [], 0, 0, 0
    for character in re.split(f"([{begin}{end}])", with_marks):
        if character == begin:
            if depth == 0:
                spans.append((start, at))
            depth += 1
        elif character == end:
            depth -= 1
            start = at
        else:
            at += len(character)
    spans.append((start, at))
    is_same = depth == 0 and with_marks.replace(begin, "").replace(end, "") == text
    return tuple((low, high) for low, high in spans if low < high) if is_same else ()


def moved(spans: tuple[Span, ...], by: int) -> tuple[Span, ...]:
    """The same spans of a text that follows ``by`` characters."""
    return tuple((start + by, end + by) for start, end in spans)
