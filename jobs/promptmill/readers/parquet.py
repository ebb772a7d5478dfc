"""Parquet: records in row groups, read a few thousand at a time."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmill.errors import DatasetError
from promptmill.readers.fields import BadLine
from promptmill.readers.jsonl import converted, line_of
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout

#: Records in memory at a time.
BATCH_ROWS = 4_096


def read(path: Path, layout: Layout) -> Iterator[DatasetLine]:
    """Line numbers are those of the records, counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield _line(number, record, layout)
    except (pa.ArrowException, OSError) as problem:
        first = str(problem).strip().splitlines()[0][:200]
        raise DatasetError(f"{layout.source} is no readable Parquet file: {first}") from None
    if number == 0:
        raise DatasetError(f"{layout.source} holds no records", hint="A dataset has at least one record.")


def _line(number: int, record: dict[str, Any], layout: Layout) -> DatasetLine:
    try:
        found = {name: plain(value, name) for name, value in record.items()}
    except BadLine as problem:
        return DatasetLine(number, error=str(problem))
    # As JSON text, which is what a JSONL file of the same records would hold: equal checks for both.
    return converted(number, found, json.dumps(found), lambda at, each: line_of(at, each, layout))


def plain(value: Any, name: str) -> Any:
    """``value`` as JSON has it: times as ISO 8601, decimals as numbers. Raises BadLine for what JSON cannot hold."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | decimal.Decimal):
        number = float(value)
        # Missing numbers are NaN in many files.
        return None if math.isnan(number) else number
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        return [plain(each, name) for each in value]
    if isinstance(value, dict):
        return {str(key): plain(each, name) for key, each in value.items()}
    raise BadLine(f"the column '{name[:40]}' holds {type(value).__name__}, which no prompt can show")
