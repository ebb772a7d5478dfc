"""Answers of PostgreSQL that never come, such as behind a proxy that has lost one direction: libpq waits for ever."""

from __future__ import annotations

from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.abc import PQGen
from sqlalchemy.engine import Engine

T = TypeVar("T")

#: Seconds between two looks for a signal while psycopg waits: its own default.
LOOK_S = 0.1


class TimeoutConnection(psycopg.Connection[Any]):
    """A connection that is given up when one of its waits takes too long."""

    #: Seconds; None waits for ever.
    limit_s: float | None = None

    def wait(self, gen: PQGen[T], interval: float = LOOK_S, timeout: float | None = None) -> T:
        """As psycopg's own. Raises OperationalError after ``limit_s``: the connection is closed then."""
        try:
            return super().wait(gen, interval, self.limit_s if timeout is None else timeout)
        except psycopg.errors._WaitTimeout as problem:
            if timeout is not None:
                raise
            # Whatever the server has done meanwhile: what comes now belongs to no statement any more.
            self.pgconn.finish()
            raise psycopg.OperationalError(f"no answer within {self.limit_s:g} s") from problem


def end_silent_connections(engine: Engine, seconds: float) -> None:
    """Wait so long at most for each answer of PostgreSQL to ``engine``, which is for short statements only then."""
    if engine.dialect.name != "postgresql":
        return

    def make(dialect: Any, record: Any, arguments: Any, named: Any) -> TimeoutConnection:
        connection = TimeoutConnection.connect(*arguments, **named)
        connection.limit_s = seconds
        return connection

    sa.event.listen(engine, "do_connect", make)
    # Connections from before wait as long as it takes.
    engine.dispose()
