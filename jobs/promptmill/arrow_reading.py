"""One query as an Arrow table. Imports little, for processes that are started for it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

#: Most rows of a batch of SQLite's driver, which takes the types of all rows from the first batch.
BATCH_ROWS = "50000"


class ReadingFailed(Exception):
    """A query could not be answered. Unlike the driver's own errors it passes from a process to another."""


def fetched(connection: Any, query: str, **options: str) -> Any:
    """The table, by an ``AdbcConnection``. Raises :class:`ReadingFailed`."""
    import pyarrow as pa
    from adbc_driver_manager import AdbcStatement, Error

    try:
        with AdbcStatement(connection) as statement:
            statement.set_options(**options)
            statement.set_sql_query(query)
            stream, _ = statement.execute_query()
            with pa.RecordBatchReader.from_stream(stream) as reader:
                return reader.read_all()
    except (Error, pa.ArrowException, OSError) as problem:
        raise ReadingFailed(str(problem)) from None


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

    return AdbcConnection(adbc_driver_sqlite.connect(address))
