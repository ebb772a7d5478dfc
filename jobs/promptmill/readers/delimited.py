"""CSV and TSV with a header. Values stay text: what a file does not say is not guessed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from promptmill.errors import DatasetError
from promptmill.readers.fields import BadLine, as_id, from_fields, has_field, lookup, peek_id, split_expected, take_id
from promptmill.readers.source import LONGEST_LINE, TextLine
from promptmill.sampling import CONSTRAINTS, PARAMETERS, BadParameter, check_parameter
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout

#: What a table has columns for in its own right, as every multiple-choice dataset does: never taken for a parameter.
BINDING = (*CONSTRAINTS, "tools", "n")


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
    if not layout.has_template and (binding := [name for name in header if name in BINDING]):
        raise DatasetError(
            f"{layout.source}: the column '{binding[0]}' is called as a parameter that would bind or multiply answers",
            hint="Rename it, or give --template '{{ prompt }}', to which all columns are fields. JSONL lines can set "
            "that parameter, and so can the options of the command.",
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
    # An empty cell is no id.
    cells = {name: cell for name, cell in cells.items() if cell or name not in ("id", "custom_id")}
    try:
        line = from_fields(number, cells, layout) if layout.has_template else _asked(number, cells, layout)
        return replace(line, expected=_labels(line.expected))
    except BadLine as problem:
        return DatasetLine(number, _peek(cells, layout), error=str(problem))
    except BadParameter as problem:
        return DatasetLine(number, _peek(cells, layout), error=problem.message)


def _asked(number: int, cells: dict[str, Any], layout: Layout) -> DatasetLine:
    """A record with a prompt of its own, parameters by their names, and other columns."""
    expected, cells = split_expected(cells, layout.expected)
    custom_id = take_id(cells)
    prompt = cells.pop("prompt", "")
    if not prompt:
        raise BadLine("the prompt is empty")
    found = {name: _parameter(name, cells.pop(name)) for name in PARAMETERS.keys() & cells.keys()}
    given = {name: value for name, value in found.items() if value is not None}
    return DatasetLine(number, custom_id, prompt, expected=expected, meta=cells or None, sampling=given)


def _peek(cells: dict[str, Any], layout: Layout) -> str | None:
    """The id of a record that cannot be used, where it has one."""
    if layout.id is None:
        return peek_id(cells)
    found = lookup(cells, layout.id) if has_field(cells, layout.id) else ""
    return as_id(found) if found else None


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
        # Table libraries write Python's True and False.
        value = json.loads(cell.lower() if cell in ("True", "False") else cell)
    except (ValueError, RecursionError):
        value = cell
    return check_parameter(name, value)
