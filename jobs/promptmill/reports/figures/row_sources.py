"""Where the rows of a report come from: one connection that sees one moment, or several that read ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.arrow_tables import literal, ranges, rows_with_results, tables
from promptmill.database.tables import results
from promptmill.reports.figures.columns import Floats, Places

#: Rows of a block at most.
BLOCK_ROWS = 50_000

#: An array as PostgreSQL sends it (``array_send``): five numbers of 4 bytes (dimensions, whether there are NULLs, type,
#: length, first index), and of each item its length (8) and its big-endian double.
ARRAY_HEADER = 20
ARRAY_ITEM = np.dtype([("bytes", ">i4"), ("value", ">f8")])


class RowSource(Protocol):
    """All rows of one job."""

    def began_and_ended(self) -> tuple[float, float] | None:
        """First admission and last end."""
        ...

    def blocks(self, places: Places) -> Iterator[list[Floats]]:
        """Every result once, in no order, as columns of numbers for :func:`columns.parted`."""
        ...


class NativeRows:
    """By the driver of one connection, which sees one moment."""

    def __init__(self, db: Connection, job_id: str) -> None:
        self._db, self._job_id = db, job_id

    def began_and_ended(self) -> tuple[float, float] | None:
        return began_and_ended(self._db, self._job_id)

    def blocks(self, places: Places) -> Iterator[list[Floats]]:
        query = block_query(self._db.dialect.name, self._job_id, places)
        if self._db.dialect.name != "postgresql":
            yield from _from_sqlite(self._db, query)
            return
        for first, end in ranges(0, rows_with_results(self._db, self._job_id), BLOCK_ROWS):
            yield from _from_postgresql(self._db, query.where(results.c.row.between(first, end - 1)))


class ArrowRows:
    """By ADBC: ranges of rows, several at a time."""

    def __init__(self, db: Connection, job_id: str) -> None:
        self._db, self._job_id = db, job_id

    def began_and_ended(self) -> tuple[float, float] | None:
        found = [table.to_pylist()[0] for table in self._tables(span_query(self._job_id))]
        spans = [span for each in found if (span := span_of(list(each.values()))) is not None]
        return (min(begin for begin, _ in spans), max(end for _, end in spans)) if spans else None

    def blocks(self, places: Places) -> Iterator[list[Floats]]:
        for table in self._tables(block_query(self._db.dialect.name, self._job_id, places)):
            for batch in table.to_batches():
                # By DLPack: ``to_numpy`` imports pandas where that is installed.
                yield [np.from_dlpack(column).astype(np.float64) for column in batch.columns]

    def _tables(self, query: sa.Select[Any]) -> Iterator[Any]:
        # Compiled once, for it takes as long as reading thousands of rows; the condition is its last clause.
        text = literal(self._db.engine, query)
        return tables(
            self._db,
            (
                f'{text} AND results."row" >= {first} AND results."row" < {end}'
                for first, end in ranges(0, rows_with_results(self._db, self._job_id), BLOCK_ROWS)
            ),
        )


def block_query(dialect: str, job_id: str, places: Places) -> sa.Select[Any]:
    """The numbers of a block: of each row its key, four stamps, tokens of five kinds, and whether it is a copy.

    A column has one type in all rows, and no NULL: -1 stands for tokens and keys that are unknown.
    """
    each = results.c
    # SQLite has no NaN.
    none: sa.ColumnElement[float] = sa.literal_column("'NaN'::float8" if dialect == "postgresql" else "9e999")
    stamps = (each.enqueued_at, each.admitted_at, each.first_token_at, each.finished_at)
    tokens = (each.output_tokens, each.prompt_tokens, each.cached_tokens, each.reasoning_tokens, each.max_tokens)
    columns = (
        sa.func.coalesce(places.sql, -1),
        *(sa.func.coalesce(stamp, none) for stamp in stamps),
        *(sa.func.coalesce(count, -1) for count in tokens),
        sa.case((each.deduplicated, 1), else_=0),
    )
    return sa.select(*columns).where(each.job_id == job_id)


def _from_sqlite(db: Connection, query: sa.Select[Any]) -> Iterator[list[Floats]]:
    width = len(query.selected_columns)
    driver: Any = db.connection.driver_connection
    cursor = driver.cursor()
    try:
        cursor.execute(literal(db.engine, query))
        while rows := cursor.fetchmany(BLOCK_ROWS):
            block = np.fromiter(chain.from_iterable(rows), np.float64, len(rows) * width).reshape(-1, width)
            yield [np.ascontiguousarray(column) for column in block.T]
    finally:
        cursor.close()


def _from_postgresql(db: Connection, query: sa.Select[Any]) -> Iterator[list[Floats]]:
    """Each column as one array: a message for each row takes longer than all the rest."""
    columns = list(query.selected_columns)
    arrays = query.with_only_columns(*(sa.func.array_agg(sa.cast(column, sa.Double)) for column in columns))
    driver: Any = db.connection.driver_connection
    with driver.cursor(binary=True) as cursor:
        cursor.execute(literal(db.engine, arrays))
        found = [cursor.pgresult.get_value(0, place) for place in range(len(columns))]
    if found[0] is not None:
        yield [np.frombuffer(data, ARRAY_ITEM, offset=ARRAY_HEADER)["value"].astype(np.float64) for data in found]


def began_and_ended(db: Connection, job_id: str) -> tuple[float, float] | None:
    """First admission and last end of the rows that had a slot, in seconds since the epoch; None: there are none."""
    return span_of(db.execute(span_query(job_id)).one())


def span_of(found: Sequence[Any]) -> tuple[float, float] | None:
    """What a :func:`span_query` found."""
    begin, end = found
    return None if begin is None else (float(begin), float(end))


def span_query(job_id: str) -> sa.Select[Any]:
    """First admission and last end."""
    each = results.c
    return sa.select(sa.func.min(each.admitted_at), sa.func.max(each.finished_at)).where(
        each.job_id == job_id, each.admitted_at.is_not(None), each.finished_at.is_not(None)
    )
