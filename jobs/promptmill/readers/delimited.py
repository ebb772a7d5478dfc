"""CSV and TSV with a header. Values stay text: what a file does not say is not guessed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from promptmill.errors import DatasetError
from promptmill.readers.fields import BadLine, as_id, lookup, take_expected
from promptmill.readers.source import LONGEST_LINE, TextLine
from promptmill.sampling import PARAMETERS, BadParameter, check_parameter
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
            self.error = self.error or line.error
            yield line.text + "\n"


def _read(lines: Iterator[TextLine], layout: Layout, delimiter: str) -> Iterator[DatasetLine]:
    csv.field_size_limit(LONGEST_LINE)
    feed = _Feed(lines)
    records = csv.reader(feed, delimiter=delimiter, strict=True)
    header = _header(records, feed, layout)
    empty = True
    start = feed.number + 1
    while (record := _next(records)) is not None:
        problem, feed.error = feed.error, None
        if record or problem:
            empty = False
            yield _line(start, header, record, problem, layout)
        start = feed.number + 1
    if empty:
        raise DatasetError(f"{layout.source} has a header and no records", hint="A dataset has at least one line.")


def _next(records: Iterator[list[str]]) -> list[str] | str | None:
    """The next record, what is wrong with it, or None at the end."""
    try:
        return next(records, None)
    except csv.Error as problem:
        return f"broken CSV: {problem}"


def _header(records: Iterator[list[str]], feed: _Feed, layout: Layout) -> list[str]:
    found = _next(records)
    while found == []:
        found = _next(records)
    if feed.error or not isinstance(found, list):
        raise DatasetError(f"{layout.source}:{feed.number}: the header cannot be read: {feed.error or found}")
    header = [name.strip() for name in found]
    if not all(header) or len(set(header)) != len(header):
        raise DatasetError(
            f"{layout.source}: the header has empty or repeated names", hint="The first line names the columns."
        )
    if not layout.has_template and "prompt" not in header:
        raise DatasetError(
            f"{layout.source}: the header has no column 'prompt' (it has: {', '.join(header)[:200]})",
            hint="Name the column prompt, or give --template or --task to make prompts from the columns.",
        )
    return header


def _line(number: int, header: list[str], record: list[str] | str, problem: str | None, layout: Layout) -> DatasetLine:
    """``problem``: what is wrong with the text of the record."""
    if problem is None and isinstance(record, str):
        problem = record
    if problem is None and len(record) != len(header):
        problem = f"{len(record)} fields, the header has {len(header)}"
    if problem is not None:
        return DatasetLine(number, error=problem)
    return _from_cells(number, dict(zip(header, record, strict=True)), layout)


def _from_cells(number: int, cells: dict[str, Any], layout: Layout) -> DatasetLine:
    """A template gets every column but id and labels; else there is a prompt, and the other columns are ``meta``."""
    custom_id = None
    try:
        whole = dict(cells)
        custom_id = _take_id(cells) if layout.id is None else as_id(lookup(cells, layout.id))
        expected = _labels(take_expected(cells, layout.expected))
        if layout.has_template:
            cells.pop(layout.id or "", None)
            about = {name: lookup(whole, path) for name, path in layout.meta.items()} or None
            if layout.input:
                cells = {name: lookup(whole, path) for name, path in layout.input.items()}
            return DatasetLine(number, custom_id, fields=cells, expected=expected, meta=about)
        prompt = cells.pop("prompt")
        if not prompt:
            raise BadLine("the prompt is empty")
        sampling = {name: _parameter(name, cells.pop(name)) for name in PARAMETERS.keys() & cells.keys()}
        given = {name: value for name, value in sampling.items() if value is not None}
        return DatasetLine(number, custom_id, prompt, expected=expected, meta=cells or None, sampling=given)
    except BadLine as problem:
        return DatasetLine(number, custom_id, error=str(problem))
    except BadParameter as problem:
        return DatasetLine(number, custom_id, error=problem.message)


def _take_id(cells: dict[str, Any]) -> str | None:
    """Remove ``id`` and ``custom_id``. An empty cell is no id."""
    found = {cells.pop(name) for name in ("custom_id", "id") if name in cells} - {""}
    if len(found) > 1:
        raise BadLine("id and custom_id differ")
    return found.pop() if found else None


def _labels(expected: Any) -> Any:
    """Without empty cells: a record that has none of them is not labelled."""
    if isinstance(expected, dict):
        expected = {name: value for name, value in expected.items() if value != ""}
    return expected or None


def _parameter(name: str, cell: str) -> Any:
    """A sampling parameter from its cell: a number, true or false; None for an empty cell. Stop strings are text."""
    if not cell or name == "stop":
        return check_parameter(name, cell) if cell else None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        value = cell
    return check_parameter(name, value)
