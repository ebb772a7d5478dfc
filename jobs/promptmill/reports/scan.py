"""One pass over the timed rows of a job, in blocks of numbers, as fast as each database gives them, in flat memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from promptmill.tables import results

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Truths = NDArray[np.bool_]

#: Rows of a block.
BLOCK_ROWS = 50_000

#: Bytes before the first row of PostgreSQL's binary COPY (signature, flags, length of the extension).
COPY_HEADER = 19


@dataclass(frozen=True, slots=True)
class Key:
    """What rows are counted by."""

    worker_id: str | None
    state: str
    finish_reason: str | None
    error_class: str | None


@dataclass(frozen=True, slots=True)
class Series:
    """Columns of rows that had a slot, all of one length. Seconds since the epoch; NaN where a stamp is missing.

    The tokens of an answer that was copied from an identical request are 0: they were computed once, for that one.
    """

    enqueued_at: Floats
    admitted_at: Floats
    first_token_at: Floats
    finished_at: Floats
    output_tokens: Floats
    #: Prompt tokens that were computed; empty where they were not asked for.
    prefill_tokens: Floats = field(default_factory=lambda: np.empty(0))

    def __len__(self) -> int:
        return len(self.admitted_at)

    def where(self, chosen: Truths) -> Series:
        """The rows for which ``chosen`` is true."""
        if chosen.all():
            return self
        columns = (getattr(self, name) for name in self.__slots__)
        return Series(*(column[chosen] if len(column) else column for column in columns))

    @property
    def timed(self) -> Truths:
        """Rows that had a slot to their end."""
        return np.isfinite(self.admitted_at) & np.isfinite(self.finished_at)

    @staticmethod
    def joined(parts: list[Series]) -> Series:
        """All rows of ``parts``, which is emptied: large columns are not held twice."""
        columns = [[getattr(part, name) for part in parts] for name in Series.__slots__]
        parts.clear()
        found = []
        for column in columns:
            found.append(np.concatenate(column) if column else np.empty(0))
            column.clear()
        return Series(*found)


def keys(db: Connection, job_id: str) -> list[Key]:
    """Every key of the job's results, sorted."""
    each = results.c
    query = sa.select(each.worker_id, each.state, each.finish_reason, each.error_class).distinct()
    found = [Key(*row) for row in db.execute(query.where(each.job_id == job_id))]
    return sorted(found, key=lambda key: tuple(part or "" for part in _parts(key)))


def blocks(db: Connection, job_id: str, known: list[Key], prefill: bool = False) -> Iterator[tuple[Ints, Series]]:
    """All results of the job, once each and in no order: the places of their keys in ``known``, and their columns.

    ``known`` is what :func:`keys` found; ``prefill`` asks for the column of that name.
    """
    if not known:
        return
    postgres = db.dialect.name == "postgresql"
    columns = [_number_of(known), *_columns(postgres, prefill)]
    if postgres:
        columns = [sa.cast(column, sa.Double) for column in columns]
    query = sa.select(*columns).where(results.c.job_id == job_id)
    sql = str(query.compile(db, compile_kwargs={"literal_binds": True}))
    # The compiler doubles percent signs for a driver that fills parameters in; here are none.
    source = (
        _from_postgresql(db, sql.replace("%%", "%"), len(columns)) if postgres else _from_sqlite(db, sql, len(columns))
    )
    for rows in source:
        # SQLite has no NaN: what is missing comes as infinity.
        rows[np.isinf(rows)] = np.nan
        key, *others = (np.ascontiguousarray(column) for column in rows.T)
        yield key.astype(np.int64), Series(*others)


def _columns(postgres: bool, prefill: bool) -> list[sa.ColumnElement[Any]]:
    each = results.c
    missing: sa.ColumnElement[float] = sa.literal_column("'NaN'::float8" if postgres else "9e999")
    stamps = (each.enqueued_at, each.admitted_at, each.first_token_at, each.finished_at)
    counts = [each.output_tokens, each.prompt_tokens - each.cached_tokens] if prefill else [each.output_tokens]
    return [
        *(sa.func.coalesce(stamp, missing) for stamp in stamps),
        *(sa.case((each.deduplicated, 0), else_=sa.func.coalesce(count, 0)) for count in counts),
    ]


def _parts(key: Key) -> tuple[str | None, ...]:
    return key.worker_id, key.state, key.finish_reason, key.error_class


def _number_of(known: list[Key]) -> sa.ColumnElement[int]:
    """The place of a row's key in ``known``: numbers cross the border much faster than texts."""
    each = results.c
    columns = (each.worker_id, each.state, each.finish_reason, each.error_class)
    return sa.case(
        *(
            (sa.and_(*(_is(column, part) for column, part in zip(columns, _parts(key), strict=True))), number)
            for number, key in enumerate(known[:-1])
        ),
        else_=len(known) - 1,
    ) if len(known) > 1 else sa.literal(0)  # fmt: skip


def _is(column: sa.Column[str], value: str | None) -> sa.ColumnElement[bool]:
    return column.is_(None) if value is None else column == value


def _from_sqlite(db: Connection, sql: str, width: int) -> Iterator[Floats]:
    driver: Any = db.connection.driver_connection
    cursor = driver.cursor()
    try:
        cursor.execute(sql)
        while rows := cursor.fetchmany(BLOCK_ROWS):
            yield np.fromiter(chain.from_iterable(rows), np.float64, len(rows) * width).reshape(-1, width)
    finally:
        cursor.close()


def _from_postgresql(db: Connection, sql: str, width: int) -> Iterator[Floats]:
    """By binary COPY: each row is the number of its fields, then each field's length (8) and its big-endian double."""
    form = np.dtype([("fields", ">i2"), ("values", [("bytes", ">i4"), ("value", ">f8")], (width,))])
    driver: Any = db.connection.driver_connection
    held, begin = bytearray(), COPY_HEADER
    with driver.cursor() as cursor, cursor.copy(f"COPY ({sql}) TO STDOUT (FORMAT BINARY)") as copy:
        for data in copy:
            held += data
            if len(held) >= BLOCK_ROWS * form.itemsize:
                count = (len(held) - begin) // form.itemsize
                yield _decoded(held, form, begin, count)
                held, begin = held[begin + count * form.itemsize :], 0
    # What is left over at the end is the trailer of two bytes.
    yield _decoded(held, form, begin, (len(held) - begin) // form.itemsize)


def _decoded(held: bytearray, form: np.dtype[Any], begin: int, count: int) -> Floats:
    rows = np.frombuffer(held, form, count, begin)
    return rows["values"]["value"].astype(np.float64)
