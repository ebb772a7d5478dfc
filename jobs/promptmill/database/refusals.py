"""What a database refuses, and "it is not there": the driver's errors as one clear error."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.core.addresses import masked, sqlite_url
from promptmill.errors import DatabaseError, first_line

#: What keeps SQLite from its file, and is no fault of a statement: another writer, a full disk, a lost permission.
SQLITE_UNUSABLE = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
)  # fmt: skip

#: Seconds that a statement waits for another transaction's lock on PostgreSQL. One that held it longer is stuck.
LOCK_S = 30

#: SQLSTATE lock_not_available of PostgreSQL.
LOCKED = "55P03"

#: Its read_only_sql_transaction: services that run it for others set that when a disk is full, and so does a failover.
READ_ONLY = "25006"

#: SQLSTATE -> what PostgreSQL refuses through no fault of the statement, and what to do.
REFUSALS = {
    LOCKED: (
        f"another transaction has kept the database from this change for {LOCK_S} s",
        "Nothing was changed. Try again; pg_stat_activity shows who holds locks.",
    ),
    READ_ONLY: ("the database takes no changes: it is read-only", "Nothing was changed. Is its disk full?"),
    # An idle_in_transaction_session_timeout.
    "25P03": ("the database ended a transaction in which nothing happened", "Nothing of it was stored."),
    "40P01": ("this transaction and another one waited for each other: the database ended it", "Try again."),
    "53100": ("the disk of the database is full", "Nothing was changed. Make room on it, then try again."),
    "53200": ("the database has run out of memory", "Nothing was changed. Give its server more, then try again."),
    "53300": ("the database has no connection left", "End other programs that use it, or raise its max_connections."),
    "57014": ("the database ended a statement", "Try again. If its statement_timeout ended it, raise that."),
}

#: What servers, and poolers before them, say in place of a SQLSTATE to a client for which they have no connection.
FULL = ("too many clients", "remaining connection slots", "too many connections", "no more connections allowed")

#: SQLSTATEs of a table or a column that is not there.
UNDEFINED = ("42P01", "42703")

#: The same in SQLite's words.
SQLITE_LACKS = re.compile("no such (table|column)|has no column named|foreign key mismatch")

#: Beginnings of SQLSTATEs that say that the connection is gone: its own errors, and a server that stops.
AWAY = ("08", "57P")


@contextmanager
def connecting(engine: Engine) -> Iterator[None]:
    """Turn what the database refuses, and "it is not there", into one clear error."""
    try:
        yield
    except Exception as problem:
        if (clear := _refusal(problem) or _unusable(engine, problem)) is not None:
            raise clear from problem
        raise


def _refusal(problem: Exception) -> DatabaseError | None:
    # COPY goes past SQLAlchemy, which would wrap its errors.
    cause = getattr(problem, "orig", problem)
    state = getattr(cause, "sqlstate", None)
    if state is None and any(each in str(cause) for each in FULL):
        state = "53300"
    lacks = isinstance(cause, sqlite3.OperationalError) and SQLITE_LACKS.search(str(cause)) is not None
    if state in UNDEFINED or lacks:
        hint = "'promptmill db upgrade' brings it up to date, or says what is missing."
        return DatabaseError(f"the database lacks what this version needs: {first_line(problem)}", hint=hint)
    if state not in REFUSALS:
        return None
    what, hint = REFUSALS[state]
    return DatabaseError(what, hint=hint)


def _unusable(engine: Engine, problem: Exception) -> DatabaseError | None:
    if _is_away(engine, problem):
        hint = "Check that it runs and that JOBS_DATABASE_URL names it ('promptmill config' shows it)."
    elif _is_unusable_file(problem):
        hint = "Check which other program writes to it, and that its disk has room; then try again."
    else:
        return None
    return DatabaseError(f"cannot use the database {shown(engine)}: {first_line(problem)}", hint=hint)


def _is_away(engine: Engine, problem: Exception) -> bool:
    if isinstance(problem, sa.exc.OperationalError) and (problem.connection_invalidated or problem.statement is None):
        # An error of a statement has the statement; one of connecting has none.
        return True
    cause = getattr(problem, "orig", problem)
    if is_out_of_step(cause):
        return True
    state = getattr(cause, "sqlstate", None)
    is_away = state.startswith(AWAY) if state else cause is problem
    return is_away and isinstance(cause, engine.dialect.loaded_dbapi.OperationalError)


def _is_unusable_file(problem: Exception) -> bool:
    # The low byte is the kind, what is above it a closer description.
    code = getattr(getattr(problem, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in SQLITE_UNUSABLE


def is_out_of_step(problem: Any) -> bool:
    """Whether the driver got other answers than it asked for: a pooler adds its own to that of a server it lost."""
    return type(problem).__name__ == "InternalError" and getattr(problem, "sqlstate", "") is None


def shown(engine: Engine) -> str:
    """Where a database is, without secrets."""
    if engine.dialect.name == "sqlite":
        return sqlite_url(engine.url.database or "")
    return masked(engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
