"""Datasets: files of lines, streamed in constant memory. A format is a file here and a line in READERS."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from promptmill.core.registry import resolve, suggestion
from promptmill.errors import DatasetError
from promptmill.readers import hub
from promptmill.readers.ids import IdTable
from promptmill.readers.sniffing import ENDINGS, format_of
from promptmill.readers.source import DatasetSource, TextLine
from promptmill.types import DatasetLine

#: Format -> the function that turns its lines of text into dataset lines.
READERS = {
    "jsonl": "promptmill.readers.jsonl:read",
    "openai_batch": "promptmill.readers.openai_batch:read",
    "csv": "promptmill.readers.delimited:read_csv",
    "tsv": "promptmill.readers.delimited:read_tsv",
    "text": "promptmill.readers.plain_text:read",
    "json": "promptmill.readers.json_list:read",
}

#: Formats that are no text: the function reads the file itself.
FILE_READERS = {"parquet": "promptmill.readers.parquet:read"}

FORMATS = (*READERS, *FILE_READERS)

__all__ = ["ENDINGS", "FILE_READERS", "FORMATS", "READERS", "Dataset", "Layout", "checked", "open_dataset"]

#: What makes a path a pattern.
_PATTERN = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Layout:
    """What a reader must know beyond the lines: which fields are expected values, and whether a template follows."""

    #: Name of the file, for messages that concern all of it.
    source: str
    #: Name of the expected value -> field of the line.
    expected: Mapping[str, str]
    has_template: bool
    #: Field that names the line; None looks for ``id`` and ``custom_id``.
    id: str | None = None
    #: Name in the template -> field of the line; empty gives the template every field that is not expected.
    input: Mapping[str, str] = field(default_factory=dict)
    #: ``meta`` name -> field of the line.
    meta: Mapping[str, str] = field(default_factory=dict)
    #: Second and later lines of one id become ``id#2``, ``id#3`` instead of errors.
    number_duplicates: bool = False
    #: Each object has all keys that its column has anywhere, null where the record has none: as Parquet stores them.
    is_filled: bool = False


class Reader(Protocol):
    """Turns lines of text into dataset lines; a bad one becomes a line with an ``error``."""

    def __call__(self, lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]: ...


class Dataset:
    """A file of lines. It may be read any number of times; standard input is kept in a temporary file for that."""

    #: Files that it consists of.
    files = 1

    def __init__(self, source: DatasetSource, format_: str, layout: Layout) -> None:
        self._source = source
        self._layout = layout
        self.name = source.name
        self.format = format_

    @property
    def sha256(self) -> str:
        """SHA-256 of the file's bytes, as they lie on disk."""
        return self._source.sha256

    @property
    def number_duplicates(self) -> bool:
        """Whether lines that share an id are numbered instead of refused."""
        return self._layout.number_duplicates

    def lines(self) -> Iterator[DatasetLine]:
        """Every line, in order. Raises :class:`DatasetError` for what concerns the file as a whole."""
        if self.format in FILE_READERS:
            found: Iterator[DatasetLine] = resolve("dataset format", self.format, FILE_READERS)(
                self._source.path, self._layout
            )
            return found
        reader: Reader = resolve("dataset format", self.format, READERS)
        return reader(self._source.lines(quoted=self.format in ("csv", "tsv")), self._layout)

    def checked(self) -> Iterator[DatasetLine]:
        """Every line with an id, and those that share one with an error or a number."""
        return checked(self.lines(), self.number_duplicates, self._place_in_text)

    def _place_in_text(self, line: int) -> str:
        return f"line {line}"

    def place(self, line: int) -> str:
        """Where a line is, for people: ``file:line``."""
        return f"{self.name}:{line}"

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_dataset(
    path: str | Path,
    *,
    name: str | None = None,
    format: str | None = None,
    expected: Mapping[str, str] | None = None,
    has_template: bool = False,
    id: str | None = None,
    input: Mapping[str, str] | None = None,
    meta: Mapping[str, str] | None = None,
    number_duplicates: bool = False,
) -> Dataset:
    """Open a dataset; ``-`` is standard input.

    A folder or a pattern such as ``day-*.jsonl`` is all of its files, one after the other; ``hf:OWNER/NAME`` is a
    dataset of the Hugging Face hub. ``name``: what a file is called, if not as its path says.

    ``expected``, ``input`` and ``meta`` map names to fields of the lines, and ``id`` is the field that names a line.
    A field may be a path such as ``context.title``. Raises :class:`DatasetError` for a file that is
    missing, empty, or of an unknown format.
    """
    layout = Layout("", dict(expected or {}), has_template, id, dict(input or {}), dict(meta or {}), number_duplicates)
    given = str(path)
    if given.startswith(hub.PREFIX):
        return _opened(
            DatasetSource.spooled(hub.records(given), given), format or "jsonl", replace(layout, is_filled=True)
        )
    if _is_many(given):
        from promptmill.readers.many import open_many

        return open_many(given, lambda each: _opened(DatasetSource.open(str(each)), format, layout))
    source = DatasetSource.open(given)
    source.name = name or source.name
    return _opened(source, format, layout)


def _is_many(name: str) -> bool:
    # What is no path at all, such as a whole prompt, is neither.
    return os.path.isdir(name) or (not _PATTERN.isdisjoint(name) and not os.path.exists(name))


def _opened(source: DatasetSource, format_: str | None, layout: Layout) -> Dataset:
    try:
        found = _format(source, format_)
        is_filled = layout.is_filled or found in FILE_READERS
        return Dataset(source, found, replace(layout, source=source.name, is_filled=is_filled))
    except BaseException:
        source.close()
        raise


def _format(source: DatasetSource, asked: str | None) -> str:
    if asked is not None and asked not in FORMATS:
        raise DatasetError(f"unknown dataset format '{asked}'", hint=suggestion(asked, FORMATS))
    if asked in READERS:
        # Raises for a file without a line.
        source.first_lines(1)
    return asked or format_of(source)


def checked(
    lines: Iterable[DatasetLine], number_duplicates: bool = False, place: Callable[[int], str] = "line {}".format
) -> Iterator[DatasetLine]:
    """The same lines, each with an id: ``row-N`` (N counts from 0) where the file gives none.

    The second and later ones with the same id carry an error that names the first, or, with ``number_duplicates``,
    get ``#2``, ``#3`` behind it. Generated ids are compared with given ones, so that no two rows can share one.
    ``place`` says where a line is.
    """
    seen = IdTable()
    for row, line in enumerate(lines):
        if line.custom_id is None:
            line = _with_generated_id(line, row, seen, place)
        elif line.error is None:
            line = _with_own_id(line, line.custom_id, seen, number_duplicates, place)
        yield line


def _with_generated_id(line: DatasetLine, row: int, seen: IdTable, place: Callable[[int], str]) -> DatasetLine:
    custom_id = f"row-{row}"
    first = seen.first_line(custom_id, line.line)
    line = replace(line, custom_id=custom_id)
    if first == line.line or line.error is not None:
        return line
    return replace(line, error=f"the line has no id and would be called '{custom_id}', the id of {place(first)}")


def _with_own_id(
    line: DatasetLine, custom_id: str, seen: IdTable, number_duplicates: bool, place: Callable[[int], str]
) -> DatasetLine:
    first = seen.first_line(custom_id, line.line)
    if first == line.line:
        return line
    if not number_duplicates:
        return replace(line, error=f"duplicate id '{custom_id[:40]}', first in {place(first)}")
    count = 2
    while seen.first_line(f"{custom_id}#{count}", line.line) != line.line:
        count += 1
    return replace(line, custom_id=f"{custom_id}#{count}")
