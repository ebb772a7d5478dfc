"""Queries of people, on a connection that cannot write and that gives up in time."""

from __future__ import annotations

import contextlib
import csv
import json
import pickle
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database import reading
from promptmill.errors import PromptmillError
from promptmill.outputs import appearing, folder_of
from promptmill.spreadsheets import inert
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
    begin = re.match(r"(?is)(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*(select|with|values|explain)\b", text)
    if not begin:
        raise QueryError(
            "only queries that read are run: SELECT, WITH, VALUES or EXPLAIN",
            hint=f"Named queries: {', '.join(QUERIES)}.",
        )
    late = threading.Event()
    with reading(db) as connection, _read_only(connection, seconds, late):
        try:
            found = _executed(connection, text, begin[1].lower() == "explain")
            try:
                yield list(found.keys()), _in_time(found, seconds, late)
            finally:
                # Of a statement that was ended SQLite says once more that it was.
                with contextlib.suppress(sa.exc.DBAPIError):
                    found.close()
        except sa.exc.DBAPIError as problem:
            raise (_took_longer(seconds) if late.is_set() else _clear(problem)) from None


def _executed(connection: Connection, text: str, plan: bool) -> sa.CursorResult[Any]:
    """The rows of one statement, streamed; ``plan``: an EXPLAIN, which PostgreSQL has no cursor for."""
    if connection.dialect.name != "postgresql":
        return connection.execution_options(yield_per=BATCH_ROWS).exec_driver_sql(text)
    if not plan:
        connection = connection.execution_options(yield_per=BATCH_ROWS)
    elif ";" in text:
        # A cursor takes one statement only. Without one the server would run all, COMMIT among them.
        raise QueryError("an EXPLAIN is one statement: leave out the ';'")
    return connection.exec_driver_sql(text.replace("%", "%%"))


def _in_time(found: Any, seconds: float, late: threading.Event) -> Iterator[Sequence[Any]]:
    """The rows. Between two pages of them there is no statement to be cancelled."""
    for row in found:
        if late.is_set():
            raise _took_longer(seconds)
        yield tuple(row)


@contextmanager
def _read_only(connection: Connection, seconds: float, late: threading.Event) -> Iterator[None]:
    """``late`` is set, and what runs is cancelled, when the query has taken so long with all its pages.

    A statement_timeout of PostgreSQL would be one of each page.
    """
    driver: Any = connection.connection.driver_connection
    postgresql = connection.dialect.name == "postgresql"
    if postgresql:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        _without_powers(connection)
    else:
        connection.exec_driver_sql("PRAGMA query_only = ON")

    def end() -> None:
        late.set()
        (driver.cancel_safe if postgresql else driver.interrupt)()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        # What it has begun to cancel must not be the next statement.
        timer.join()
        if not postgresql:
            connection.exec_driver_sql("PRAGMA query_only = OFF")


def _without_powers(connection: Connection) -> None:
    """A superuser's query must not read the server's files or end its connections: it runs as one who reads tables."""
    powerful = connection.exec_driver_sql("SELECT current_setting('is_superuser')").scalar() == "on"
    # The role came with PostgreSQL 14.
    if powerful and (connection.dialect.server_version_info or (0,)) >= (14,):
        connection.exec_driver_sql("SET LOCAL ROLE pg_read_all_data")


def _took_longer(seconds: float) -> QueryError:
    return QueryError(f"the query took longer than {seconds:g} s", hint="Give --timeout SECONDS, or ask for less.")


def _clear(problem: sa.exc.DBAPIError) -> QueryError:
    text = str(problem.orig).strip().splitlines()[0] if str(problem.orig).strip() else type(problem.orig).__name__
    if "readonly" in text or "read-only" in text:
        return QueryError("the query writes: only queries that read are run")
    return QueryError(f"the query is wrong: {text}", hint="'promptmill query --list' shows views and named queries.")


def write_csv(columns: list[str], rows: Iterator[Sequence[Any]], stream: IO[str], spreadsheet: bool = False) -> None:
    """``spreadsheet``: no cell is a formula."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(inert(columns) if spreadsheet else columns)
    writer.writerows(map(inert, rows) if spreadsheet else rows)


def write_jsonl(columns: list[str], rows: Iterator[Sequence[Any]], stream: IO[str]) -> None:
    """Raises :class:`QueryError` for two columns of one name."""
    _refuse_equal_names(columns)
    for row in rows:
        line = dict(zip(columns, row, strict=True))
        stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def write_parquet(columns: list[str], rows: Iterator[Sequence[Any]], path: str) -> None:
    """The file appears whole or not at all. Raises :class:`QueryError` for two columns of one name.

    Rows are kept in a file beside it until all types are known: a column may be whole numbers, or empty, for a million
    rows and then not. Whole numbers beside fractions become fractions, anything beside text becomes text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _refuse_equal_names(columns)
    kinds: list[set[type]] = [set() for _ in columns]
    with tempfile.TemporaryFile(dir=folder_of(path)) as held:
        for row in rows:
            cells = [_plain(cell) for cell in row]
            for kind, cell in zip(kinds, cells, strict=True):
                kind.add(type(cell))
            pickle.dump(cells, held, pickle.HIGHEST_PROTOCOL)
        held.seek(0)
        types = [_type_of(kind - {type(None)}) for kind in kinds]
        schema = pa.schema([(name, getattr(pa, kind)()) for name, (kind, _) in zip(columns, types, strict=True)])
        with appearing(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for batch in _batches(held):
                block = zip(*batch, strict=True)
                arrays = [
                    pa.array([None if cell is None else make(cell) for cell in column], field.type)
                    for column, field, (_, make) in zip(block, schema, types, strict=True)
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _refuse_equal_names(columns: list[str]) -> None:
    """Where a row has one value of each name."""
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise QueryError(f"two columns are called '{twice[0]}'", hint="Name them apart with AS, or write CSV.")


def _plain(cell: Any) -> Any:
    return float(cell) if type(cell).__name__ == "Decimal" else cell


def _batches(held: IO[bytes]) -> Iterator[list[list[Any]]]:
    batch: list[list[Any]] = []
    with contextlib.suppress(EOFError):
        while True:
            batch.append(pickle.load(held))
            if len(batch) == BATCH_ROWS:
                yield batch
                batch = []
    if batch:
        yield batch


def _type_of(kinds: set[type]) -> tuple[str, Callable[[Any], Any]]:
    """Arrow's name of the type that holds all of ``kinds``, and what makes a value of it."""
    if kinds and kinds <= {bool}:
        return "bool_", bool
    if kinds and kinds <= {bool, int}:
        return "int64", int
    if kinds and kinds <= {bool, int, float}:
        return "float64", float
    return ("binary", bytes) if kinds == {bytes} else ("string", str)
