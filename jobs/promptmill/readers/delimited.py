"""CSV and TSV with a header. Values stay text: what a file does not say is not guessed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TYPE_CHECKING

from promptmill.errors import DatasetError
from promptmill.readers.fields import from_fields
from promptmill.readers.source import LONGEST_LINE, TextLine
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout


def read_csv(lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]:
    return _read(lines, layout, ",")


def read_tsv(lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]:
    return _read(lines, layout, "\t")


class _Feed:
    """Hands text to the csv module, which asks for more lines inside quotes; remembers where it is."""

    def __init__(self, lines: Iterator[TextLine]) -> None:
        self._lines = lines
        self.number = 0
        self.error: str | None = None

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.number = line.number
            if line.error:
                self.error = line.error
            yield line.text + "\n"


def _read(lines: Iterator[TextLine], layout: Layout, delimiter: str) -> Iterator[DatasetLine]:
    csv.field_size_limit(LONGEST_LINE)
    feed = _Feed(lines)
    records = csv.reader(feed, delimiter=delimiter, strict=True)
    header = _header(records, feed)
    if not layout.has_template and "prompt" not in header:
        raise DatasetError(
            f"the header has no column 'prompt' (it has: {', '.join(header)[:200]})",
            hint="Name the column prompt, or give --template or --task to make prompts from the columns.",
        )
    while True:
        start = feed.number + 1
        try:
            record = next(records)
        except StopIteration:
            return
        except csv.Error as problem:
            yield DatasetLine(start, error=f"broken CSV: {problem}")
            continue
        if feed.error:
            yield DatasetLine(start, error=feed.error)
            feed.error = None
        elif len(record) not in (0, len(header)):
            yield DatasetLine(start, error=f"{len(record)} fields, the header has {len(header)}")
        elif record:
            yield _line(start, dict(zip(header, record, strict=True)), layout)


def _header(records: Iterator[list[str]], feed: _Feed) -> list[str]:
    try:
        header = [name.strip() for name in next(records)]
    except (StopIteration, csv.Error) as problem:
        raise DatasetError(f"the header cannot be read: {problem}") from None
    if feed.error:
        raise DatasetError(f"line {feed.number}: {feed.error}")
    if not all(header) or len(set(header)) != len(header):
        raise DatasetError("the header has empty or repeated names", hint="The first line names the columns.")
    return header


def _line(number: int, fields: dict[str, str], layout: Layout) -> DatasetLine:
    if layout.has_template:
        return from_fields(number, fields, layout)
    prompt = fields.pop("prompt")
    if not prompt.strip():
        return DatasetLine(number, error="the prompt is empty")
    custom_id = fields.pop("custom_id", None) or fields.pop("id", None)
    expected = {name: fields.pop(field) for name, field in layout.expected.items() if field in fields}
    return DatasetLine(number, custom_id, prompt=prompt, expected=expected or None, meta=fields or None)
