"""What the database refuses now it may take in a moment: results wait for it, they are never dropped."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

import psycopg
import sqlalchemy as sa

from promptmill.core.backoff import Backoff
from promptmill.errors import DatabaseError, first_line
from promptmill_workers.worker.shutdown import Shutdown

log = logging.getLogger("promptmill.worker")

#: Between two tries.
WAIT = Backoff(0.1, 5.0)

#: A restart, a cut connection, one that is in use for long, a lock that is not granted, a full disk: none of it is the
#: statement's fault.
PASSING = (
    sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError, psycopg.OperationalError, DatabaseError,
)  # fmt: skip

T = TypeVar("T")


class GaveUp(DatabaseError):
    """The database was away for as long as anybody waits for it."""


def gave_up(waited_s: float, problem: Exception) -> GaveUp:
    """The error of a run whose database took nothing for ``waited_s`` seconds."""
    return GaveUp(
        f"the database took no change for {waited_s:g} s: {first_line(problem)}",
        hint="What is stored is safe. Put the cause right (disk space?), then resume the job.",
    )


class DatabaseRetry:
    """Repeats a transaction until it is taken. The engine meanwhile fills its host's outbox, a chunk at most."""

    def __init__(self, stop: Shutdown, limit_s: float | None = None) -> None:
        """``limit_s``: give up after so many seconds; None repeats until the worker is told to drop everything."""
        self._stop = stop
        self._limit_s = limit_s

    def __call__(self, transaction: Callable[[bool], T]) -> T:
        """``transaction(again)``; ``again`` says that an earlier try may have been committed without our learning it.

        Raises what the database raised when the worker drops everything, or GaveUp after ``limit_s``.
        """
        # From before the first try: SQLite itself waits half a minute for another writer.
        began = time.monotonic()
        try:
            return transaction(False)
        except PASSING as problem:
            return self._insist(transaction, problem, began)

    def _insist(self, transaction: Callable[[bool], T], problem: Exception, began: float) -> T:
        with self._stop.blocked():
            for failures in count(1):
                log.warning("the database did not take a change, trying again: %s", first_line(problem))
                if self._limit_s is not None and time.monotonic() - began > self._limit_s:
                    raise gave_up(self._limit_s, problem) from problem
                if self._stop.abandoning.wait(WAIT.delay_s(failures) * random.uniform(0.75, 1.25)):  # noqa: S311
                    raise problem
                try:
                    return transaction(True)
                except PASSING as again:
                    problem = again
        raise problem
