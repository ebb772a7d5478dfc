"""Which format a file has: by its name, unless its first lines say otherwise."""

from __future__ import annotations

import json
from typing import Any

from promptmill.errors import DatasetError
from promptmill.readers.source import DatasetSource

#: File name ending -> format.
ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "text", ".json": "json"}
ENDINGS[".parquet"] = "parquet"

#: Beside ``body``, any of these makes a line one of OpenAI's batch format.
NAMES_A_CALL = {"custom_id", "method", "url"}

#: Lines that are looked at: enough to get past broken ones at the start.
LINES = 100

#: How a Parquet file begins.
PARQUET = b"PAR1"


def format_of(source: DatasetSource) -> str:
    """Raises DatasetError where neither the name nor the content tells it."""
    named = ENDINGS.get(source.ending)
    if named == "parquet" or source.begins_with(PARQUET):
        return "parquet"
    lines = source.first_lines(LINES)
    if named is None and not source.is_stream:
        raise DatasetError(
            f"{source.name}: cannot tell the format by the name",
            hint=f"Known endings: {', '.join(ENDINGS)}, each also with .gz or .zst. Or give --format.",
        )
    if named in ("csv", "tsv"):
        return _table(named, lines)
    return "text" if named == "text" else _json(named, lines)


def _table(named: str, lines: list[str]) -> str:
    """A header that has only the other format's delimiter is one of that format; one that is JSON is none."""
    if _record(lines[0]) is not None:
        return _json("jsonl", lines)
    own, other = (",", "\t") if named == "csv" else ("\t", ",")
    header = lines[0].partition("\r")[0]
    if own not in header and other in header:
        return "tsv" if named == "csv" else "csv"
    return named


def _json(named: str | None, lines: list[str]) -> str:
    """JSON by the line, or one document. A stream, which has no name, may be plain text too."""
    records = [record for record in map(_record, lines) if record is not None]
    if _is_document(named, lines):
        return "json"
    if named is None and not records and not lines[0].startswith("{"):
        return "text"
    return "openai_batch" if any(map(_is_call, records)) else "jsonl"


def _is_document(named: str | None, lines: list[str]) -> bool:
    """Whether the lines are one JSON document: a list, or, by the file's name, an object that holds one."""
    if lines[0].startswith("["):
        # A line that is a list by itself, with others behind it, is a broken line of JSONL.
        return len(lines) == 1 or not _is_json(lines[0])
    if lines[0] == "{":
        return True
    first = _record(lines[0])
    if named != "json":
        return False
    # An object in one line is the whole document, or the first of several records.
    return first is None or (len(lines) == 1 and (not first or _holds_records(first)))


def _holds_records(document: dict[str, Any]) -> bool:
    """Whether an object is a dataset that has its records under one key, and no record itself."""
    if not document.keys().isdisjoint(("prompt", "messages")):
        return False
    lists = [each for each in document.values() if isinstance(each, list)]
    return any(not each or isinstance(each[0], dict) for each in lists)


def _is_call(record: dict[str, Any]) -> bool:
    """A line of OpenAI's batch format has a ``body`` and says where it is to be posted."""
    return isinstance(record.get("body"), dict) and not record.keys().isdisjoint(NAMES_A_CALL)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _record(line: str) -> dict[str, Any] | None:
    """The object that the line is; None for anything else."""
    try:
        found = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
