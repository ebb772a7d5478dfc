"""Queries of people, on a connection that cannot write and that gives up in time."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database import reading
from promptmill.errors import PromptmillError
from promptmill.views import QUERIES

#: Rows fetched, and written to Parquet, at a time.
BATCH_ROWS = 5_000

#: Rows that a table for people shows.
TABLE_ROWS = 1_000


class QueryError(PromptmillError):
    """A query is wrong, writes, or took too long."""


@contextmanager
def querying(db: Engine, sql: str, seconds: float) -> Iterator[tuple[list[str], Iterator[Sequence[Any]]]]:
    """Column names and rows of ``sql``, a SELECT or the name of a query, streamed. Raises :class:`QueryError`."""
    text = QUERIES[sql.strip()].sql if sql.strip() in QUERIES else sql.strip().rstrip(";")
    if not re.match(r"(?is)\(*\s*(select|with|values|explain)\b", text):
        raise QueryError(
            "only queries that read are run: SELECT, WITH, VALUES or EXPLAIN",
            hint=f"Named queries: {', '.join(QUERIES)}.",
        )
    with reading(db) as connection, _read_only(connection, seconds):
        try:
            found = connection.execution_options(yield_per=BATCH_ROWS).exec_driver_sql(text.replace("%", "%%"))
            yield list(found.keys()), _translated(found)
        except sa.exc.DBAPIError as problem:
            raise _clear(problem, seconds) from None


def _translated(found: Any) -> Iterator[Sequence[Any]]:
    for row in found:
        yield tuple(row)


@contextmanager
def _read_only(connection: Connection, seconds: float) -> Iterator[None]:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(1000 * seconds)}")
        yield
        return
    connection.exec_driver_sql("PRAGMA query_only = ON")
    driver: Any = connection.connection.driver_connection
    timer = threading.Timer(seconds, driver.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        connection.exec_driver_sql("PRAGMA query_only = OFF")


def _clear(problem: sa.exc.DBAPIError, seconds: float) -> QueryError:
    text = str(problem.orig).strip().splitlines()[0] if str(problem.orig).strip() else type(problem.orig).__name__
    if "interrupted" in text or "statement timeout" in text:
        return QueryError(f"the query took longer than {seconds:g} s", hint="Give --timeout SECONDS, or ask for less.")
    if "readonly" in text or "read-only" in text:
        return QueryError("the query writes: only queries that read are run")
    return QueryError(f"the query is wrong: {text}", hint="'promptmill query --list' shows views and named queries.")


def write_csv(columns: list[str], rows: Iterator[Sequence[Any]], stream: IO[str]) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)


def write_jsonl(columns: list[str], rows: Iterator[Sequence[Any]], stream: IO[str]) -> None:
    for row in rows:
        line = dict(zip(columns, row, strict=True))
        stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def write_parquet(columns: list[str], rows: Iterator[Sequence[Any]], path: str) -> None:
    """Types are those of the first batch; a column that is empty there is text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    batch: list[Sequence[Any]] = []

    def flush() -> None:
        nonlocal writer
        block = list(zip(*batch, strict=True)) or [() for _ in columns]
        if writer is None:
            arrays = [pa.array(column) for column in block]
            fields = [
                (name, pa.string() if pa.types.is_null(each.type) else each.type)
                for name, each in zip(columns, arrays, strict=True)
            ]
            writer = pq.ParquetWriter(path, pa.schema(fields), compression="zstd")
        arrays = [pa.array(column, field.type) for column, field in zip(block, writer.schema, strict=True)]
        writer.write_table(pa.Table.from_arrays(arrays, schema=writer.schema))
        batch.clear()

    for row in rows:
        batch.append([float(cell) if type(cell).__name__ == "Decimal" else cell for cell in row])
        if len(batch) == BATCH_ROWS:
            flush()
    if batch or writer is None:
        flush()
    writer.close()
