"""Plain text: a prompt a line. Blank lines are left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from promptmill.readers.source import MARK, TextLine
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout


def read(lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]:
    """With a template a line is its field ``prompt``; else it is the prompt itself."""
    for line in lines:
        # A byte order mark is left where files were put together.
        text = line.text.removeprefix(MARK)
        if line.error:
            yield DatasetLine(line.number, error=line.error)
        elif not text.strip():
            continue
        elif layout.has_template:
            yield DatasetLine(line.number, fields={"prompt": text})
        else:
            yield DatasetLine(line.number, prompt=text)
