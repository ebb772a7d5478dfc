"""Parquet: records in row groups, read a few thousand at a time."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmill.errors import DatasetError, first_line
from promptmill.readers.fields import BadLine
from promptmill.readers.jsonl import converted, line_of
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    import pyarrow as pa

    from promptmill.readers import Layout

#: Records in memory at a time.
BATCH_ROWS = 4_096

#: What Arrow raises for a value that Python cannot hold: years beyond 9999, unknown time zones, text that is no UTF-8,
#: a key twice in a map.
_NO_VALUE = (ValueError, ArithmeticError, LookupError, TypeError)


def read(path: Path, layout: Layout) -> Iterator[DatasetLine]:
    """Line numbers are those of the records, counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _refuse_repeated(file.schema_arrow.names, layout)
            for batch in file.iter_batches(BATCH_ROWS):
                for record in _records(batch):
                    number += 1
                    yield _line(number, record, layout)
    except (pa.ArrowException, OSError) as problem:
        raise DatasetError(f"{layout.source} is no readable Parquet file: {first_line(problem)}") from None
    if number == 0:
        raise DatasetError(f"{layout.source} holds no records", hint="A dataset has at least one record.")


def _refuse_repeated(names: list[str], layout: Layout) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DatasetError(f"{layout.source} has two columns called '{twice[:40]}'", hint="Rename one of them.")


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadLine]:
    """Each record, or what is wrong with it."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except _NO_VALUE:
        # One cell has no value in Python: the other rows are read.
        for row in range(batch.num_rows):
            yield _record(batch, row)


def _record(batch: pa.RecordBatch, row: int) -> dict[str, Any] | BadLine:
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            found[name] = column[row].as_py(maps_as_pydicts="strict")
        except _NO_VALUE as problem:
            return BadLine(f"the column '{name[:40]}' holds a {column.type} that cannot be read: {str(problem)[:120]}")
    return found


def _line(number: int, record: dict[str, Any] | BadLine, layout: Layout) -> DatasetLine:
    try:
        if isinstance(record, BadLine):
            raise record
        found = {name: plain(value, name) for name, value in record.items()}
    except BadLine as problem:
        return DatasetLine(number, error=str(problem))
    # As JSON text, which is what a JSONL file of the same records would hold: equal checks for both.
    return converted(number, found, json.dumps(found), lambda at, each: line_of(at, each, layout))


def plain(value: Any, name: str) -> Any:
    """``value`` as JSON has it: times as ISO 8601, decimals as numbers. Raises BadLine for what JSON cannot hold."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, decimal.Decimal) and value.same_quantum(1):
        # The column has no decimal places, as ids have none: a float would lose digits.
        return int(value)
    if isinstance(value, float | decimal.Decimal):
        number = float(value)
        if math.isinf(number):
            raise BadLine(f"the column '{name[:40]}' holds an infinite number, which JSON has not")
        # Missing numbers are NaN in many files.
        return None if math.isnan(number) else number
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, list):
        return [plain(each, name) for each in value]
    if isinstance(value, dict):
        return {str(plain(key, name)): plain(each, name) for key, each in value.items()}
    raise BadLine(f"the column '{name[:40]}' holds {type(value).__name__}, which no prompt can show")
