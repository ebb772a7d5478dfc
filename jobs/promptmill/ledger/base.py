"""What all parts of the ledger share: the database, its clock, and conditions on rows."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database.clock import DatabaseClock
from promptmill.database.engine import epoch
from promptmill.database.tables import chunks, jobs, results
from promptmill.ledger.values import BACKOFF_S, JITTER, LEASE_S, LONGEST_BACKOFF_S, MAX_ATTEMPTS, OPEN_STATES, Standing
from promptmill.types import ChunkId, ChunkState, JobState, Lease

log = logging.getLogger("promptmill.ledger")


class LedgerBase:
    """One database. ``clock`` replaces the database's clock in tests."""

    def __init__(
        self,
        db: Engine,
        *,
        lease_s: float = LEASE_S,
        max_attempts: int = MAX_ATTEMPTS,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.db = db
        self.lease_s = lease_s
        self._max_attempts = max_attempts
        self._clock = clock
        #: Read whenever a chunk is claimed and results are stored.
        self.database_clock = DatabaseClock()

    def _now(self) -> Any:
        return sa.literal(self._clock(), sa.Double()) if self._clock else epoch()

    def read_clock(self, db: Connection) -> tuple[float, DatabaseClock]:
        """The database's time, and its clock, which turns this machine's ``time.monotonic()`` into it."""
        # A clock of a test moves by itself.
        clock = DatabaseClock() if self._clock else self.database_clock
        return clock.read(lambda: db.execute(sa.select(self._now())).scalar_one()), clock

    def _standing(self, db: Connection, job_id: str) -> Standing:
        state = db.execute(sa.select(jobs.c.state).where(jobs.c.id == job_id)).scalar()
        if state in OPEN_STATES:
            return Standing.HELD
        return Standing.PAUSED if state == JobState.PAUSED.value else Standing.UNWANTED

    def _lock_job(self, db: Connection, job_id: str) -> None:
        """Let one transaction at a time number chunks of the job, or end it.

        It is NO KEY UPDATE: a chunk that is changed twice in a transaction makes PostgreSQL check its foreign key and
        share-lock the job's key, and two of them would wait for each other's full lock.
        """
        db.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id).with_for_update(key_share=True))

    def _not_before(self, failures: int) -> Any:
        """When to try again what has failed so often."""
        delay = min(BACKOFF_S * 2 ** (failures - 1), LONGEST_BACKOFF_S)
        return self._now() + delay * (1 + JITTER * random.random())  # noqa: S311 - no secret

    def _add_chunks(
        self, db: Connection, job_id: str, rows: Iterable[int], most: int, failures: int, not_before: Any
    ) -> None:
        """New chunks for rows that have lost theirs: runs of consecutive ones. The caller holds the job's lock."""
        last = db.execute(sa.select(sa.func.max(chunks.c.number)).where(chunks.c.job_id == job_id)).scalar()
        for number, run in enumerate(_runs(rows, most), start=(last or 0) + 1):
            db.execute(
                sa.insert(chunks).values(
                    job_id=job_id, number=number, first_row=run.start, rows=len(run), state=ChunkState.QUEUED.value,
                    attempt=0, failures=failures, not_before=not_before, ok=0, errors=0, moved=0, output_tokens=0,
                )
            )  # fmt: skip


def is_chunk(chunk: ChunkId) -> sa.ColumnElement[bool]:
    return sa.and_(chunks.c.job_id == chunk.job_id, chunks.c.number == chunk.number)


def held_by(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(is_chunk(lease.chunk), chunks.c.state == ChunkState.LEASED.value, chunks.c.attempt == lease.attempt)


def in_range(column: sa.Column[Any], lease: Lease) -> sa.ColumnElement[bool]:
    return column.between(lease.first_row, lease.first_row + lease.rows - 1)


def model_of(db: Connection, job_id: str) -> str:
    """The model of a job that is there."""
    return str(db.execute(sa.select(jobs.c.model).where(jobs.c.id == job_id)).scalar_one())


def counts_of(db: Connection, job_id: str) -> tuple[int, int]:
    """Answers and errors of a job so far."""
    ok, errors = db.execute(
        sa.select(sa.func.sum(chunks.c.ok), sa.func.sum(chunks.c.errors)).where(chunks.c.job_id == job_id)
    ).one()
    return int(ok or 0), int(errors or 0)


def counts_between(
    db: Connection, job_id: str, span: range, except_rows: sa.Select[tuple[int]]
) -> tuple[int, int, int]:
    """Answers, errors and generated tokens stored for the rows of ``span``, without those of a query."""
    is_ok = results.c.state == "ok"
    generated = sa.and_(is_ok, ~results.c.deduplicated)
    ok, total, tokens = db.execute(
        sa.select(
            sa.func.sum(sa.case((is_ok, 1), else_=0)),
            sa.func.count(),
            sa.func.sum(sa.case((generated, results.c.output_tokens), else_=0)),
        )
        .where(results.c.job_id == job_id, results.c.row.between(span.start, span.stop - 1))
        .where(results.c.row.not_in(except_rows))
    ).one()
    return int(ok or 0), int(total) - int(ok or 0), int(tokens or 0)


def _runs(rows: Iterable[int], most: int) -> Iterable[range]:
    """Ascending rows as runs of consecutive ones, each of at most ``most``."""
    start = end = None
    for row in rows:
        if start is None or row != end or row - start >= most:
            if start is not None and end is not None:
                yield range(start, end)
            start = row
        end = row + 1
    if start is not None and end is not None:
        yield range(start, end)


def storable(text: str) -> str:
    """PostgreSQL has no room for NUL in a text."""
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}") if "\x00" in text else text
