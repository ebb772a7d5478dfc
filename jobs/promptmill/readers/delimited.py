"""CSV and TSV with a header. Values stay text: what a file does not say is not guessed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from promptmill.errors import DatasetError
from promptmill.readers.fields import BadLine, as_id, from_fields, has_field, lookup, peek_id, split_expected, take_id
from promptmill.readers.source import LONGEST_LINE, MARK, TextLine
from promptmill.tasks.sampling import ALIASES, CONSTRAINTS, PARAMETERS, BadParameter, check_parameter
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
    """Hands lines to the csv module, which asks for more inside quotes; those of a broken record it can give again."""

    def __init__(self, lines: Iterator[TextLine]) -> None:
        self._lines = lines
        self._again: list[TextLine] = []
        #: Lines of the record that is being read, and what is wrong with their text.
        self.taken: list[TextLine] = []
        self.error: str | None = None

    def __iter__(self) -> Iterator[str]:
        while (line := self._again.pop() if self._again else next(self._lines, None)) is not None:
            self.taken.append(line)
            self.error = self.error or line.error
            # Where lines end in a carriage return alone, the other half of a longer end begins the next one.
            yield line.text.removeprefix("\n") + "\n"

    @property
    def number(self) -> int:
        """Number of the line that was read last."""
        return self.taken[-1].number if self.taken else 0

    def give_back(self, after: int) -> None:
        """Read the lines of the record behind line number ``after`` once more."""
        self._again += reversed([line for line in self.taken if line.number > after])
        self.taken = [line for line in self.taken if line.number <= after]
        self.error = next((line.error for line in self.taken if line.error), None)


def _read(lines: Iterator[TextLine], layout: Layout, delimiter: str) -> Iterator[DatasetLine]:
    csv.field_size_limit(LONGEST_LINE)
    feed = _Feed(lines)
    # A reader ends with its lines; lines that were given back need one that goes on.
    records = csv.reader(feed, delimiter=delimiter, strict=True)
    header = _header(records, feed, layout)
    empty = True
    while True:
        feed.taken, feed.error = [], None
        record = _next(records)
        if isinstance(record, str):
            record = _broken(record, feed, delimiter)
            records = csv.reader(feed, delimiter=delimiter, strict=True)
        if record is None:
            break
        if record or feed.error:
            empty = False
            yield _line(feed, header, record, layout)
    if empty:
        raise DatasetError(f"{layout.source} has a header and no records", hint="A dataset has at least one line.")


def _next(records: Iterator[list[str]]) -> list[str] | str | None:
    """The next record, what is wrong with it, or None at the end."""
    try:
        return next(records, None)
    except csv.Error as problem:
        return str(problem)


def _broken(problem: str, feed: _Feed, delimiter: str) -> str:
    """What is wrong with a broken record. A quote that swallowed the lines behind it gives them back: they count."""
    opened = _open_quote(feed.taken, delimiter)
    if opened is None or (opened == feed.number and "unexpected end" not in problem):
        return f"broken CSV: {problem}"
    feed.give_back(after=opened)
    return f"broken CSV: the quote that opens in line {opened} is not closed where its field ends"


def _open_quote(lines: list[TextLine], delimiter: str) -> int | None:
    """Number of the line in which the quoted field begins that does not end as one, of a broken record."""
    inside = closing = False
    fresh, opened = True, 0
    for line in lines:
        for character in f"{line.text}\n":
            if inside:
                closing, inside = character == '"', character != '"'
            elif closing and character not in (delimiter, "\n"):
                if character != '"':
                    return opened
                # Two quotes are one that is meant.
                closing, inside = False, True
            else:
                inside, closing = fresh and character == '"', False
                opened = line.number if inside else opened
                fresh = character in (delimiter, "\n")
    return opened if inside else None


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


def _line(feed: _Feed, header: list[str], record: list[str] | str, layout: Layout) -> DatasetLine:
    """The record that was just read, or what is wrong with it."""
    first, problem = feed.taken[0], feed.error
    number = first.number
    if problem is None and first.text.startswith(MARK):
        problem = "a byte order mark inside the file: are these two files, one behind the other? Give them as a folder"
    if problem is None and isinstance(record, str):
        problem = record
    if problem is None and len(record) != len(header):
        problem = f"{len(record)} fields, the header has {len(header)}"
    if problem is not None:
        return DatasetLine(number, error=problem)
    return _from_cells(number, dict(zip(header, record, strict=True)), layout)


def _from_cells(number: int, cells: dict[str, Any], layout: Layout) -> DatasetLine:
    """A template gets every column but id and labels; else there is a prompt, and the other columns are ``meta``."""
    for name in ("id", "custom_id"):
        # An empty cell is no id.
        if cells.get(name) == "":
            del cells[name]
    try:
        line = from_fields(number, cells, layout) if layout.has_template else _asked(number, cells, layout)
        return line if line.expected is None else replace(line, expected=_labels(line.expected))
    except BadLine as problem:
        return DatasetLine(number, _peek(cells, layout), error=str(problem))
    except BadParameter as problem:
        return DatasetLine(number, _peek(cells, layout), error=problem.message)


def _asked(number: int, cells: dict[str, Any], layout: Layout) -> DatasetLine:
    """A record with a prompt of its own, parameters by their names, and other columns."""
    if layout.expected:
        expected, cells = split_expected(cells, layout.expected)
    else:
        expected = cells.pop("expected", None)
    custom_id = take_id(cells)
    prompt = cells.pop("prompt", "")
    if not prompt:
        raise BadLine("the prompt is empty")
    names = [*(ALIASES.keys() & cells.keys()), *(PARAMETERS.keys() & cells.keys())]
    found = {ALIASES.get(name, name): _parameter(ALIASES.get(name, name), cells.pop(name)) for name in names}
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
