"""One query as an Arrow table. Imports little, for processes that are started for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

#: Most rows of a batch of SQLite's driver, which takes the types of all rows from the first batch.
BATCH_ROWS = "50000"

#: Milliseconds that SQLite waits for another program's lock: as ``database`` has it, whose import takes long.
BUSY_MS = 30_000


class ReadingFailed(Exception):
    """A query could not be answered. Unlike the driver's own errors it passes from a process to another."""

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        super().__init__(message, sqlstate)
        self.message, self.sqlstate = message, sqlstate


@contextmanager
def failing() -> Iterator[None]:
    """Errors of the driver as :class:`ReadingFailed`."""
    import pyarrow as pa
    from adbc_driver_manager import Error

    try:
        yield
    except (Error, pa.ArrowException, OSError) as problem:
        raise ReadingFailed(str(problem), getattr(problem, "sqlstate", None)) from None


def execute(connection: Any, statement: str) -> None:
    """A statement that finds nothing, by an ``AdbcConnection``. Raises :class:`ReadingFailed`."""
    from adbc_driver_manager import AdbcStatement

    with failing(), AdbcStatement(connection) as prepared:
        prepared.set_sql_query(statement)
        prepared.execute_update()


def fetched(connection: Any, query: str, **options: str) -> Any:
    """What a query finds. Raises :class:`ReadingFailed`."""
    import pyarrow as pa
    from adbc_driver_manager import AdbcStatement

    with failing(), AdbcStatement(connection) as statement:
        statement.set_options(**options)
        statement.set_sql_query(query)
        stream, _ = statement.execute_query()
        with pa.RecordBatchReader.from_stream(stream) as reader:
            return reader.read_all()


def read_file(address: str, query: str) -> bytes:
    """The table from a SQLite file, packed for the way to another process."""
    import pyarrow as pa

    table = fetched(_connection(address), query, **{"adbc.sqlite.query.batch_rows": BATCH_ROWS})
    sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


@lru_cache(maxsize=1)
def _connection(address: str) -> Any:
    """The connection of this process."""
    # Without the ``dbapi`` of these packages, whose import takes as long as reading a million rows.
    import adbc_driver_sqlite
    from adbc_driver_manager import AdbcConnection

    with failing():
        connection = AdbcConnection(adbc_driver_sqlite.connect(address))
    fetched(connection, f"PRAGMA busy_timeout={BUSY_MS}")
    return connection
