"""One query as an Arrow table. Imports little, for processes that are started for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

#: Most rows of a batch of SQLite's driver, which takes the types of all rows from the first batch.
BATCH_ROWS = "50000"


class ReadingFailed(Exception):
    """A query could not be answered. Unlike the driver's own errors it passes from a process to another."""


@contextmanager
def answering(connection: Any, query: str, **options: str) -> Iterator[Any]:
    """A ``RecordBatchReader`` of what an ``AdbcConnection`` finds. Raises :class:`ReadingFailed`."""
    import pyarrow as pa
    from adbc_driver_manager import AdbcStatement, Error

    try:
        with AdbcStatement(connection) as statement:
            statement.set_options(**options)
            statement.set_sql_query(query)
            stream, _ = statement.execute_query()
            with pa.RecordBatchReader.from_stream(stream) as reader:
                yield reader
    except (Error, pa.ArrowException, OSError) as problem:
        raise ReadingFailed(str(problem)) from None


def read_file(address: str, query: str) -> bytes:
    """The table from a SQLite file, packed for the way to another process."""
    import pyarrow as pa

    sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        answering(_connection(address), query, **{"adbc.sqlite.query.batch_rows": BATCH_ROWS}) as reader,
        pa.ipc.new_stream(sink, reader.schema, options=options) as writer,
    ):
        for batch in reader:
            writer.write_batch(batch)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


@lru_cache(maxsize=1)
def _connection(address: str) -> Any:
    """The connection of this process."""
    # Without the ``dbapi`` of these packages, whose import takes as long as reading a million rows.
    import adbc_driver_sqlite
    from adbc_driver_manager import AdbcConnection

    return AdbcConnection(adbc_driver_sqlite.connect(address))
