"""Queries of people, on a connection that cannot write and that gives up in time."""

from __future__ import annotations

import contextlib
import csv
import json
import pickle
import re
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.core.outputs import appearing, folder_of
from promptmill.database.engine import reading
from promptmill.database.reader_role import SECRET, bound, reader, refuse_disturbing
from promptmill.database.views import QUERIES
from promptmill.errors import PromptmillError
from promptmill.store.spreadsheets import inert

#: Rows fetched, and written to Parquet, at a time.
BATCH_ROWS = 5_000

#: Tables of SQLite that no query reads: secret ones, and those that hold bytes of all others.
HIDDEN = (*SECRET, "sqlite_dbpage", "sqlite_stat4")

#: Rows that a table for people shows.
TABLE_ROWS = 1_000


class QueryError(PromptmillError):
    """A query is wrong, writes, or took too long."""


@contextmanager
def querying(
    db: Engine, sql: str, seconds: float, reader_url: str | None = None
) -> Iterator[tuple[list[str], Iterator[Sequence[Any]]]]:
    """Column names and rows of ``sql``, a SELECT or the name of a query, streamed. Raises :class:`QueryError`.

    ``reader_url``: of a user of PostgreSQL that may only read, where the owner cannot make one.
    """
    text = QUERIES[sql.strip()].sql if sql.strip() in QUERIES else sql.strip().rstrip(";")
    begin = re.match(r"(?is)(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*(select|with|values|explain)\b", text)
    if not begin:
        raise QueryError(
            "only queries that read are run: SELECT, WITH, VALUES or EXPLAIN",
            hint=f"Named queries: {', '.join(QUERIES)}.",
        )
    if db.dialect.name == "postgresql":
        refuse_disturbing(text)
    late = threading.Event()
    with _harmless(db, reader_url) as reader, reading(reader) as connection, _read_only(connection, seconds, late):
        try:
            found = _executed(connection, text, begin[1].lower() == "explain")
            try:
                yield list(found.keys()), _in_time(found, seconds, late)
            finally:
                # SQLite repeats here that a statement was ended.
                with contextlib.suppress(sa.exc.DBAPIError):
                    found.close()
        except sa.exc.DBAPIError as problem:
            raise (_took_longer(seconds) if late.is_set() else _clear(problem)) from None


def _harmless(db: Engine, reader_url: str | None) -> AbstractContextManager[Engine]:
    """The engine on which a query may run."""
    return reader(db, reader_url) if db.dialect.name == "postgresql" else contextlib.nullcontext(db)


def _executed(connection: Connection, text: str, plan: bool) -> sa.CursorResult[Any]:
    """The rows of one statement, streamed; ``plan``: an EXPLAIN, which PostgreSQL has no cursor for."""
    if connection.dialect.name != "postgresql":
        if not plan:
            _refuse_hidden(connection, text)
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

    A statement_timeout of PostgreSQL is one of each page: it is for clients that are gone.
    """
    driver: Any = connection.connection.driver_connection
    postgresql = connection.dialect.name == "postgresql"
    if postgresql:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        bound(connection, seconds)
        connection.exec_driver_sql("SAVEPOINT query")
    else:
        connection.exec_driver_sql("PRAGMA query_only = ON")
        driver.set_authorizer(_may)

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
        if postgresql:
            _clean(driver)
        else:
            driver.set_authorizer(None)
            connection.exec_driver_sql("PRAGMA query_only = OFF")


def _clean(driver: Any) -> None:
    """Undo what a query did to its session: a pooler gives it to others next."""
    import psycopg

    with contextlib.suppress(psycopg.Error):
        driver.execute("ROLLBACK TO SAVEPOINT query; SELECT pg_advisory_unlock_all()")


def _may(action: int, first: str | None, *rest: str | None) -> int:
    """SQLite's question whether a statement may do something. That nothing is written is seen to by query_only."""
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_READ and first in HIDDEN else sqlite3.SQLITE_OK


def _refuse_hidden(connection: Connection, text: str) -> None:
    """Raises :class:`QueryError` where the program of a statement of SQLite opens a hidden table.

    SQLite does not ask :func:`_may` about columns that are named by USING or NATURAL alone.
    """
    names = ", ".join(f"'{name}'" for name in HIDDEN)
    roots = connection.exec_driver_sql(f"SELECT rootpage FROM sqlite_master WHERE tbl_name IN ({names})")  # noqa: S608 - our names
    pages = set(roots.scalars())
    for _, operation, _, page, *_ in connection.exec_driver_sql(f"EXPLAIN {text}"):
        if operation in ("OpenRead", "OpenWrite", "ReopenIdx") and page in pages:
            raise QueryError("access to api_keys is prohibited", hint="'promptmill keys list' shows keys.")


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
