"""The database: engines for SQLite and PostgreSQL, their transactions, and where the two differ."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from ulid import ULID

from promptmill.core.addresses import database_url
from promptmill.database import counting
from promptmill.database.refusals import LOCK_S, READ_ONLY, connecting, is_out_of_step
from promptmill.errors import DatabaseError

#: Milliseconds that a writer of SQLite waits for another one.
SQLITE_BUSY_MS = 30_000

#: Parameters of libpq. A server that is cut off is noticed within about ten seconds, and not after the two hours that
#: TCP would wait: first probe after 4 s, two more after 3 s each; the last is milliseconds that sent bytes wait for
#: their receipt.
CONNECTION: dict[str, Any] = {
    "connect_timeout": 10, "application_name": "promptmill", "keepalives": 1, "keepalives_idle": 4,
    "keepalives_interval": 3, "keepalives_count": 2, "tcp_user_timeout": 10_000,
}  # fmt: skip


class epoch(FunctionElement[float]):
    """Now, by the database's clock, in seconds since the epoch: workers' clocks may be wrong."""

    type = sa.Double()
    inherit_cache = True


@compiles(epoch, "postgresql")
def _epoch_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(epoch, "sqlite")
def _epoch_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


def now_of(db: Connection) -> float:
    """What the database's clock says."""
    return float(db.execute(sa.select(epoch())).scalar_one())


def database_now(db: Engine) -> float:
    """The same in a transaction of its own."""
    with reading(db) as connection:
        return now_of(connection)


def id_at(now: float) -> str:
    """A new id. Ids sort by when they were made: ``now`` is the database's, for clocks of machines may be wrong."""
    return str(ULID.from_timestamp(now))


def connect(url: str, *, connections: int | None = None, idle_s: float | None = None) -> Engine:
    """An engine for ``url``. Makes the folder of a SQLite file; opens no connection yet.

    ``connections``: the most that are open at one time; None: 4, and 16 more while they are needed. ``idle_s``:
    PostgreSQL ends a transaction in which nothing has happened for so long: a worker that is suspended in the middle of
    one would keep its locks, and others from taking its chunks back.

    Its errors name statements without their parameters: prompts and answers are among these.

    Raises :class:`DatabaseError` for a URL that cannot be understood or another kind of database.
    """
    parsed = database_url(url)
    try:
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(parsed)
        return _postgresql(parsed, connections, idle_s)
    except (ValueError, TypeError, sa.exc.ArgumentError):
        raise DatabaseError("JOBS_DATABASE_URL: the value of an option cannot be used") from None


def _postgresql(url: sa.URL, connections: int | None, idle_s: float | None) -> Engine:
    url, never_prepare = _options_of(url)
    # What the URL says itself stays.
    connect_args = {name: value for name, value in CONNECTION.items() if name not in url.query}
    pool = (
        {"pool_size": 4, "max_overflow": 16} if connections is None else {"pool_size": connections, "max_overflow": 0}
    )
    # The driver begins no transaction: `begin` does, together with what holds for the transaction.
    engine = sa.create_engine(
        url, pool_pre_ping=True, **pool, connect_args=connect_args,
        hide_parameters=True, isolation_level="AUTOCOMMIT",
    )  # fmt: skip
    settings = [_set_unless_set("lock_timeout", LOCK_S)]
    if idle_s is not None:
        settings.append(f"SET LOCAL idle_in_transaction_session_timeout = {round(1000 * idle_s)}")

    def begin(connection: Connection) -> None:
        asked = connection.get_execution_options()
        if asked.get("isolation_level") != "AUTOCOMMIT":
            how = "BEGIN ISOLATION LEVEL REPEATABLE READ" if asked.get("promptmill_reading") else "BEGIN"
            # One way to the server and back. Nothing is set for longer than the transaction: behind a pooler the next
            # one may have another server.
            _begin_postgresql(connection, "; ".join([how, *settings]))

    def look(connection: Any, record: Any) -> None:
        if never_prepare or _is_pooled(connection):
            connection.prepare_threshold = None

    sa.event.listen(engine, "connect", look)
    sa.event.listen(engine, "begin", begin)
    sa.event.listen(engine, "handle_error", _leave_unusable)
    return engine


def _begin_postgresql(connection: Connection, statements: str) -> None:
    driver: Any = connection.connection.driver_connection
    try:
        # Several statements cannot be prepared.
        driver.execute(statements, prepare=False)
    except Exception:
        # Past SQLAlchemy, which would find out by itself that the connection is gone.
        connection.invalidate()
        raise


def _set_unless_set(name: str, seconds: int) -> str:
    """A setting for this transaction, where the database or the role has none of its own."""
    return f"SELECT set_config('{name}', '{seconds}s', true) WHERE current_setting('{name}') = '0'"


def _is_pooled(connection: Any) -> bool:
    """Whether a pooler is between us and the server: then it is not the server's process that said its number.

    What is prepared on one of a pooler's servers is unknown on the next one.
    """
    found = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone()
    return bool(found[0] != connection.info.backend_pid)


def _options_of(url: sa.URL) -> tuple[sa.URL, bool]:
    """The URL without what is ours, and whether it asks that nothing is prepared (``prepare_threshold=0``)."""
    asked = url.query.get("prepare_threshold", "5")
    if asked not in ("0", "5"):
        raise DatabaseError(
            "JOBS_DATABASE_URL: prepare_threshold is 0 (nothing is prepared, for poolers) or left out",
            hint="A pooler such as pgbouncer is noticed by itself.",
        )
    url = url.difference_update_query(["prepare_threshold"])
    return url, asked == "0"


def libpq_address(db: Connection) -> str:
    """The connection string of the PostgreSQL server that ``db`` is connected to, for another driver made of libpq."""
    from psycopg import conninfo, pq

    asked = {**CONNECTION, **db.dialect.create_connect_args(db.engine.url)[1]}
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    # Where the URL leaves something open, or names several servers, two libraries may choose differently.
    info: Any = db.connection.driver_connection.info  # type: ignore[union-attr]
    there = {"host": info.host, "port": info.port, "dbname": info.dbname, "user": info.user, "client_encoding": "UTF8"}
    given = {name: value for name, value in asked.items() if name in known and name != "hostaddr"}
    return conninfo.make_conninfo(**(given | there))


def _leave_unusable(context: Any) -> None:
    """Connections that are not to be used again: those opened while the server was read-only stay so."""
    problem = context.original_exception
    if getattr(problem, "sqlstate", None) == READ_ONLY or is_out_of_step(problem):
        context.is_disconnect = True


def _sqlite(url: sa.URL) -> Engine:
    if url.database and url.database != ":memory:" and not url.database.startswith("file:"):
        path = Path(url.database).expanduser()
        url = url.set(database=str(path))
        engine = sa.create_engine(url, connect_args={"timeout": SQLITE_BUSY_MS / 1000}, hide_parameters=True)
        # A URL that says nonsense makes no file.
        engine.dialect.create_connect_args(url)
        _keep_private(path)
    else:
        engine = sa.create_engine(
            url, poolclass=sa.StaticPool, connect_args={"check_same_thread": False}, hide_parameters=True
        )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _keep_private(path: Path) -> None:
    """A database file, new or ours, for its user alone, whatever the umask: it holds prompts, answers and keys' hashes.

    SQLite gives the files beside it the same mode. What cannot be made, SQLite itself says of it when it opens it.
    """
    with contextlib.suppress(OSError):
        folder = path.parent
        if not folder.exists():
            folder.mkdir(parents=True, mode=0o700)
            folder.chmod(0o700)
        if not path.exists():
            # Never a file that is there: to close it would free the locks that this process has on it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        for each in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))):
            if each.is_file() and each.stat().st_uid == os.geteuid() and each.stat().st_mode & 0o077:
                each.chmod(0o600)


def _prepare_sqlite(connection: Any, record: Any) -> None:
    # The driver's own BEGIN is deferred: a reader that turns writer then fails at once, whatever the timeout.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={SQLITE_BUSY_MS}",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # Plain reads must not take the write lock: `reading` marks them.
    reading = connection.get_execution_options().get("promptmill_reading")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection for reading one consistent state."""
    with connecting(engine), engine.connect().execution_options(promptmill_reading=True) as connection:
        yield connection


class CommitTimes:
    """A histogram of the seconds that commits of this process took. Any thread may add to it."""

    #: Upper bounds in seconds.
    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(self.BOUNDS) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect_left(self.BOUNDS, seconds)] += 1
            self._sum_s += seconds

    def cumulative(self) -> list[float]:
        """Commits of at most each bound, of all commits, and their sum in seconds."""
        with self._lock:
            return [*accumulate(self._counts), self._sum_s]


#: Commits of this process.
COMMITS = CommitTimes()


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction: committed at the end, rolled back by an exception. How long the commit took is in COMMITS.

    What it counted for ``/metrics`` is stored last: what waits for that waits for a commit and nothing else.
    """
    with connecting(engine), engine.connect() as connection, connection.begin() as transaction:
        try:
            yield connection
            counting.store(connection)
        finally:
            counting.discard(connection)
        started = time.perf_counter()
        transaction.commit()
        COMMITS.add(time.perf_counter() - started)


def copy_rows(connection: Connection, table: sa.Table, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Insert ``rows`` the fastest way the database has: COPY on PostgreSQL, one prepared statement on SQLite."""
    if not rows:
        return
    names = ", ".join(f'"{name}"' for name in columns)
    if connection.dialect.name == "postgresql":
        cursor = connection.connection.cursor()
        with cursor.copy(f'COPY "{table.name}" ({names}) FROM STDIN') as copy:
            for row in rows:
                copy.write_row(row)
        cursor.close()
    else:
        marks = ", ".join("?" * len(columns))
        connection.exec_driver_sql(f'INSERT INTO "{table.name}" ({names}) VALUES ({marks})', rows)  # noqa: S608 - our names


def lock_name(connection: Connection, name: str) -> None:
    """Until this transaction's end no other one has the lock of this name: waits for it, however long it takes."""
    if connection.dialect.name == "postgresql":
        # SQLite has one writer at a time anyway. For as long as it takes: others may hold it, and at length.
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, 0))))


def refresh_statistics(connection: Connection, *tables: sa.Table) -> None:
    """Tell PostgreSQL's planner about rows that were just loaded; its own daemon may come a minute late.

    A table that is being vacuumed, or analysed by another session, is left out: it is not worth waiting for.
    """
    if connection.dialect.name == "postgresql":
        names = ", ".join(f'"{table.name}"' for table in tables)
        connection.exec_driver_sql(f"ANALYZE (SKIP_LOCKED) {names}")
