"""Datasets: files of lines, streamed in constant memory. A format is a file here and a line in READERS."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from promptmill.errors import DatasetError
from promptmill.readers.ids import IdTable
from promptmill.readers.source import Source, TextLine
from promptmill.registry import resolve, suggestion
from promptmill.types import DatasetLine

#: Format -> the function that turns its lines of text into dataset lines.
READERS = {
    "jsonl": "promptmill.readers.jsonl:read",
    "openai_batch": "promptmill.readers.openai_batch:read",
    "csv": "promptmill.readers.delimited:read_csv",
    "tsv": "promptmill.readers.delimited:read_tsv",
    "text": "promptmill.readers.plain_text:read",
}

#: Beside ``body``, any of these makes a line one of OpenAI's batch format.
NAMES_A_CALL = {"custom_id", "method", "url"}

#: File name ending -> format.
ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}


@dataclass(frozen=True, slots=True)
class Layout:
    """What a reader must know beyond the lines: which fields are expected values, and whether a template follows."""

    #: Of the file, for messages that concern all of it.
    source: str
    #: Name of the expected value -> field of the line.
    expected: Mapping[str, str]
    has_template: bool


class Reader(Protocol):
    """Turns lines of text into dataset lines; a bad one becomes a line with an ``error``."""

    def __call__(self, lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]: ...


class Dataset:
    """A file of lines. It may be read any number of times; standard input is kept in a temporary file for that."""

    def __init__(self, source: Source, format_: str, layout: Layout) -> None:
        self._source = source
        self._layout = layout
        self.name = source.name
        self.format = format_

    @property
    def sha256(self) -> str:
        """Of the file's bytes, as they lie on disk."""
        return self._source.sha256

    def lines(self) -> Iterator[DatasetLine]:
        """Every line, in order. Raises :class:`DatasetError` for what concerns the file as a whole."""
        reader: Reader = resolve("dataset format", self.format, READERS)
        return reader(self._source.lines(), self._layout)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_dataset(
    path: str | Path,
    *,
    format: str | None = None,
    expected: Mapping[str, str] | None = None,
    has_template: bool = False,
) -> Dataset:
    """Open a dataset; ``-`` is standard input.

    ``expected`` maps names of expected values to fields of the lines. Raises :class:`DatasetError` for a file that is
    missing, empty, a folder, or of an unknown format.
    """
    source = Source.open(str(path))
    try:
        chosen = _format(source, format)
        return Dataset(source, chosen, Layout(source.name, dict(expected or {}), has_template))
    except BaseException:
        source.close()
        raise


def _format(source: Source, asked: str | None) -> str:
    if asked is not None and asked not in READERS:
        raise DatasetError(f"unknown dataset format '{asked}'", hint=suggestion(asked, READERS))
    first = source.first_line()
    if asked is not None:
        return asked
    found = ENDINGS.get(source.ending)
    if found is None and source.is_stream:
        found = "jsonl" if first.startswith("{") else "text"
    if found is None:
        raise DatasetError(
            f"{source.name}: cannot tell the format by the name",
            hint=f"Known endings: {', '.join(ENDINGS)}, each also with .gz or .zst. Or give --format.",
        )
    return "openai_batch" if found == "jsonl" and _is_openai_batch(first) else found


def _is_openai_batch(first_line: str) -> bool:
    """A line of OpenAI's batch format has a ``body`` and says where it is to be posted."""
    import json

    try:
        line = json.loads(first_line)
    except (ValueError, RecursionError):
        return False
    return isinstance(line, dict) and isinstance(line.get("body"), dict) and not line.keys().isdisjoint(NAMES_A_CALL)


def checked(lines: Iterable[DatasetLine]) -> Iterator[DatasetLine]:
    """The same lines; the second and later ones with the same id carry an error that names the first."""
    seen = IdTable()
    for line in lines:
        if line.custom_id is not None and line.error is None:
            first = seen.first_line(line.custom_id, line.line)
            if first != line.line:
                line = replace(line, error=f"duplicate id '{line.custom_id[:40]}', first in line {first}")
        yield line
