"""JSON: a list of records, or an object with one such list under some key. The file is in memory whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from promptmill.errors import DatasetError
from promptmill.readers.fields import kind
from promptmill.readers.jsonl import converted, decoder, line_of
from promptmill.readers.source import TextLine
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout


def read(lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]:
    """Line numbers are those of the records, counted from 1."""
    for number, record in enumerate(_records(lines, layout.source), start=1):
        text = json.dumps(record, ensure_ascii=True)
        yield converted(number, record, text, lambda at, found: line_of(at, found, layout))


def _records(lines: Iterator[TextLine], source: str) -> list[Any]:
    texts = []
    for line in lines:
        if line.error:
            raise DatasetError(f"{source}:{line.number}: {line.error}")
        texts.append(line.text)
    try:
        content = decoder().decode("\n".join(texts))
    except json.JSONDecodeError as problem:
        raise DatasetError(f"{source}:{problem.lineno}:{problem.colno}: broken JSON: {problem.msg}") from None
    except RecursionError:
        raise DatasetError(f"{source}: broken JSON: nested too deeply") from None
    except Exception as problem:
        raise DatasetError(f"{source}: {problem}") from None
    return _only_list(content, source)


def _only_list(content: Any, source: str) -> list[Any]:
    if isinstance(content, dict):
        lists = {name: value for name, value in content.items() if _is_records(value)}
        if len(lists) != 1:
            names = ", ".join(lists) or "none"
            raise DatasetError(
                f"{source}: one key of the object must hold the list of records; those that do: {names}",
                hint="Keep one list, or write the records as JSONL.",
            )
        (content,) = lists.values()
    if not isinstance(content, list):
        raise DatasetError(f"{source}: the file is {kind(content)}, not a list of records")
    if not content:
        raise DatasetError(f"{source}: the list is empty", hint="A dataset has at least one record.")
    return content


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)
