"""Plain text: a prompt a line. Blank lines are left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from promptmill.readers.source import TextLine
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout


def read(lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]:
    """With a template a line is its field ``prompt``; else it is the prompt itself."""
    for line in lines:
        if line.error:
            yield DatasetLine(line.number, error=line.error)
        elif not line.text.strip():
            continue
        elif layout.has_template:
            yield DatasetLine(line.number, fields={"prompt": line.text})
        else:
            yield DatasetLine(line.number, prompt=line.text)
