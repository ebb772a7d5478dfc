"""Queries on large jobs as Arrow tables, by drivers that make no Python object of any value (ADBC).

PostgreSQL is read by threads. A SQLite file is read by processes of their own: the driver brings its own SQLite, and
two of these in one process lift each other's locks on a file (https://sqlite.org/howtocorrupt.html, 2.2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill import parallel
from promptmill.arrow_reading import ReadingFailed, answering, read_file
from promptmill.database import libpq_address
from promptmill.errors import DatabaseError
from promptmill.types import JobState

if TYPE_CHECKING:
    import pyarrow as pa

#: Rows of a job from which it is worth the start of others.
WORTH_ROWS = 300_000

#: Queries on PostgreSQL at a time: one is answered while the answer to another is taken in.
THREADS = 2

Read = Callable[[str], Any]


def is_worth(db: Engine, state: str, rows: int) -> bool:
    """Whether a job is to be read in ranges: each has its own moment, so its rows must stay as they are."""
    if not JobState(state).is_final or rows < WORTH_ROWS:
        return False
    return db.dialect.name == "postgresql" or (_is_file(db) and parallel.processes() > 1)


def _is_file(db: Engine) -> bool:
    return bool(db.url.database) and not str(db.url.database).startswith((":memory:", "file:"))


def ranges(rows: int, size: int) -> list[tuple[int, int]]:
    """Rows 0 to ``rows`` in ranges of ``size``: the first one, and the first one after it."""
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def literal(db: Engine, query: sa.ClauseElement) -> str:
    """The query with its values in it, as a driver takes it that is given no parameters."""
    text = str(query.compile(dialect=db.dialect, compile_kwargs={"literal_binds": True}))
    # For a driver that fills parameters in, percent signs are doubled.
    return text.replace("%%", "%") if db.dialect.name == "postgresql" else text


def tables(db: Engine, queries: Iterable[str]) -> Iterator[pa.Table]:
    """What each of ``queries`` finds, in their order. Raises :class:`DatabaseError`.

    On SQLite a column must have one type in all rows, and its first value tells it.
    """
    import pyarrow as pa

    if db.dialect.name == "postgresql":
        with _told(db), _threads(libpq_address(db)) as (pool, read):
            yield from parallel.in_turn(pool, THREADS, read, ((query,) for query in queries))
    else:
        address = Path(str(db.url.database)).absolute().as_uri() + "?mode=ro"
        with _told(db), _processes() as pool:
            pieces = ((address, query) for query in queries)
            for packed in parallel.in_turn(pool, parallel.processes(), read_file, pieces):
                with pa.ipc.open_stream(packed) as reader:
                    yield reader.read_all()


def streamed(db: Engine, query: str) -> Iterator[pa.RecordBatch]:
    """What one query on PostgreSQL finds, of one moment, as it comes. Raises :class:`DatabaseError`."""
    import adbc_driver_postgresql
    from adbc_driver_manager import AdbcConnection

    with (
        _told(db),
        adbc_driver_postgresql.connect(libpq_address(db)) as database,
        AdbcConnection(database) as connection,
        answering(connection, query) as reader,
    ):
        yield from reader


@contextmanager
def _told(db: Engine) -> Iterator[None]:
    """What went wrong as one clear error."""
    from adbc_driver_manager import Error

    try:
        yield
    except (ReadingFailed, Error, BrokenProcessPool) as problem:
        where = db.url.render_as_string(hide_password=True)
        first = str(problem).strip().splitlines()[0][:200]
        raise DatabaseError(f"cannot read the database {where}: {first}", hint="Try again.") from problem


@contextmanager
def _threads(address: str) -> Iterator[tuple[Executor, Read]]:
    """Threads with a connection each."""
    # Without the ``dbapi`` of these packages, whose import takes as long as reading a million rows.
    import adbc_driver_postgresql
    from adbc_driver_manager import AdbcConnection

    with ExitStack() as stack:
        free: SimpleQueue[Any] = SimpleQueue()
        pool = ThreadPoolExecutor(THREADS)
        database = stack.enter_context(adbc_driver_postgresql.connect(address))
        for _ in range(THREADS):
            free.put(stack.enter_context(AdbcConnection(database)))
        stack.callback(pool.shutdown, cancel_futures=True)

        def read(query: str) -> Any:
            connection = free.get()
            try:
                with answering(connection, query) as reader:
                    return reader.read_all()
            finally:
                free.put(connection)

        yield pool, read


@contextmanager
def _processes() -> Iterator[Executor]:
    # Started afresh: a fork of a process that holds connections and threads could hang.
    pool = ProcessPoolExecutor(parallel.processes(), get_context("spawn"), parallel.begin_process)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
