"""Queries on large jobs as Arrow tables, by drivers that make no Python object of any value (ADBC).

PostgreSQL is read by threads, whose connections see what the caller's transaction sees. A SQLite file is read by
processes of their own: the driver brings its own SQLite, and two of these in one process lift each other's locks on a
file (https://sqlite.org/howtocorrupt.html, 2.2.1). Each query there sees its own moment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.core import processes
from promptmill.database.arrow_reading import ReadingFailed, execute, failing, fetched, read_file
from promptmill.database.engine import libpq_address, reading
from promptmill.database.refusals import LOCK_S, LOCKED, shown
from promptmill.database.tables import jobs, results
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
    """Whether a job is to be read in ranges. On SQLite its rows must stay as they are meanwhile."""
    if rows < WORTH_ROWS:
        return False
    if db.dialect.name == "postgresql":
        return True
    return bool(JobState(state).is_final) and _is_file(db) and processes.processes() > 1


def _is_file(db: Engine) -> bool:
    return bool(db.url.database) and not str(db.url.database).startswith((":memory:", "file:"))


def is_as_it_was(db: Engine, job: Any) -> bool:
    """Whether the job is now what it was when ``job`` was read: it was neither retried nor removed."""
    if db.dialect.name == "postgresql":
        # All was of one moment.
        return True
    query = sa.select(jobs.c.state, jobs.c.finished_at).where(jobs.c.id == job.id)
    with reading(db) as now:
        return now.execute(query).one_or_none() == (job.state, job.finished_at)


def rows_with_results(db: Connection, job_id: str) -> int:
    """The last row that has a result, counted from 1; 0 where none has."""
    last = db.execute(sa.select(sa.func.max(results.c.row)).where(results.c.job_id == job_id)).scalar()
    return 0 if last is None else int(last) + 1


def ranges(first: int, end: int, size: int) -> list[tuple[int, int]]:
    """Rows ``first`` to before ``end`` in ranges of ``size``: the first one, and the first one after it."""
    return [(start, min(start + size, end)) for start in range(first, end, size)]


def literal(db: Engine, query: sa.ClauseElement) -> str:
    """The query with its values in it, as a driver takes it that is given no parameters."""
    text = str(query.compile(dialect=db.dialect, compile_kwargs={"literal_binds": True}))
    # For a driver that fills parameters in, percent signs are doubled.
    return text.replace("%%", "%") if db.dialect.name == "postgresql" else text


def tables(db: Connection, queries: Iterable[str]) -> Iterator[pa.Table]:
    """What each of ``queries`` finds, in their order. Raises :class:`DatabaseError`.

    On SQLite a column must have one type in all rows, and its first value tells it.
    """
    import pyarrow as pa

    if db.dialect.name == "postgresql":
        with _told(db), _threads(db) as (pool, read):
            yield from processes.in_turn(pool, THREADS, read, ((query,) for query in queries))
    else:
        address = Path(str(db.engine.url.database)).absolute().as_uri() + "?mode=ro"
        with _told(db), _processes() as pool:
            pieces = ((address, query) for query in queries)
            for packed in processes.in_turn(pool, processes.processes(), read_file, pieces):
                with pa.ipc.open_stream(packed) as reader:
                    yield reader.read_all()


@contextmanager
def _told(db: Connection) -> Iterator[None]:
    """What went wrong as one clear error."""
    try:
        yield
    except ReadingFailed as problem:
        if problem.sqlstate == LOCKED:
            raise DatabaseError(
                f"another transaction has kept the database from being read for {LOCK_S} s",
                hint="Try again; pg_stat_activity shows who holds locks.",
            ) from None
        raise _unreadable(db, problem.message) from None
    except BrokenProcessPool:
        raise _unreadable(db, "a process that read it was ended") from None


def _unreadable(db: Connection, problem: str) -> DatabaseError:
    # The driver begins with the query.
    told = re.search(r"(?:ERROR|FATAL):\s*(.+)", problem) or re.search(r"(.+)", problem)
    why = told[1].strip()[:200] if told else "no reason was given"
    return DatabaseError(
        f"cannot read the database {shown(db.engine)}: {why}",
        hint="Check that it runs and that JOBS_DATABASE_URL names it ('promptmill config' shows it).",
    )


@contextmanager
def _threads(db: Connection) -> Iterator[tuple[Executor, Read]]:
    """Threads with a connection each that sees what ``db`` sees."""
    # Without the ``dbapi`` of these packages, whose import takes as long as reading a million rows.
    import adbc_driver_postgresql
    from adbc_driver_manager import AdbcConnection

    seen = db.execute(sa.select(sa.func.pg_export_snapshot())).scalar_one()
    all_: list[Any] = []
    free: SimpleQueue[Any] = SimpleQueue()

    def read(query: str) -> Any:
        connection = free.get()
        try:
            return fetched(connection, query)
        finally:
            free.put(connection)

    with ExitStack() as stack:
        with failing():
            database = stack.enter_context(adbc_driver_postgresql.connect(libpq_address(db)))
            for _ in range(THREADS):
                all_.append(stack.enter_context(AdbcConnection(database)))
        for connection in all_:
            execute(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            execute(connection, f"SET LOCAL lock_timeout = '{LOCK_S}s'")
            execute(connection, f"SET TRANSACTION SNAPSHOT '{seen}'")
            free.put(connection)
        pool = ThreadPoolExecutor(THREADS)
        stack.callback(pool.shutdown, cancel_futures=True)
        try:
            yield pool, read
        except BaseException:
            # An interrupted command does not wait for the end of a query.
            for connection in all_:
                with suppress(ReadingFailed), failing():
                    connection.cancel()
            raise


@contextmanager
def _processes() -> Iterator[Executor]:
    # Started afresh: a fork of a process that holds connections and threads could hang.
    pool = ProcessPoolExecutor(processes.processes(), get_context("spawn"), processes.begin_process)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
