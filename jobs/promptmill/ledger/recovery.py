"""Publishing and recovery: which chunks get a message, and which have lost their worker or their message."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.counting import counting
from promptmill.database.engine import reading, writing
from promptmill.database.tables import attempts, chunks, workers
from promptmill.ledger.base import is_chunk, model_of
from promptmill.ledger.retrying import Retrying
from promptmill.ledger.values import Standing
from promptmill.types import ChunkId, ChunkState, ErrorClass

#: Seconds that the database may take to begin a transaction, in leases, before it counts as having been away.
AWAY_LEASES = 0.1

#: Seconds of its time, in leases, that those who hold chunks then have for renewing them: more than they wait between
#: two renewals.
RETURN_LEASES = 0.3

#: Chunks taken back in one transaction, a quarter of a second's work on SQLite: all who write wait for it.
MOST_AT_ONCE = 500


class Recovery(Retrying):
    """What reconcilers and commands do; any number of them may do it at once."""

    #: By ``time.monotonic()``: until then nobody's lease is taken for lost.
    _patient_until = 0.0

    def take_window(self, job_id: str, size: int) -> list[ChunkId]:
        """Mark the next chunks as published so that at most ``size`` are under way; the caller sends their messages.

        A message that is lost between this mark and the broker is published again by the reconciler.
        """
        with writing(self.db) as db:
            if self._standing(db, job_id) is not Standing.HELD:
                return []
            under_way = db.execute(
                sa.select(sa.func.count())
                .select_from(chunks)
                .where(chunks.c.job_id == job_id, chunks.c.state != ChunkState.DONE.value)
                .where(chunks.c.published_at.is_not(None))
            ).scalar()
            room = size - (under_way or 0)
            if room <= 0:
                return []
            numbers: list[int] = []
            for waiting in self._in_turn(job_id):
                ready = (
                    waiting.where(chunks.c.published_at.is_(None), self._claimable())
                    .limit(room - len(numbers))
                    .with_for_update(skip_locked=True)
                )
                numbers += db.execute(ready).scalars()
            if numbers:
                db.execute(
                    sa.update(chunks)
                    .where(chunks.c.job_id == job_id, chunks.c.number.in_(numbers))
                    .values(published_at=self._now())
                )
        return [ChunkId(job_id, number) for number in numbers]

    def mark_published(self, lost: Sequence[ChunkId]) -> list[ChunkId]:
        """Mark queued chunks as published beyond the window of their job; returns those that may be run now."""
        marked = []
        with writing(self.db) as db:
            for chunk in lost:
                changed = db.execute(
                    sa.update(chunks)
                    .where(is_chunk(chunk), chunks.c.state == ChunkState.QUEUED.value)
                    .where(chunks.c.published_at.is_(None))
                    .where(sa.or_(chunks.c.not_before.is_(None), chunks.c.not_before <= self._now()))
                    .values(published_at=self._now())
                )
                if changed.rowcount == 1:
                    marked.append(chunk)
        return marked

    def unpublish_chunk(self, chunk: ChunkId) -> None:
        """Forget the message of a queued chunk: whoever read it does not run it."""
        with writing(self.db) as db:
            db.execute(
                sa.update(chunks)
                .where(is_chunk(chunk), chunks.c.state == ChunkState.QUEUED.value)
                .values(published_at=None)
            )

    def unpublish(self, job_id: str, older_than_s: float) -> int:
        """Forget the messages of queued chunks published longer ago than ``older_than_s``: they were lost."""
        with writing(self.db) as db:
            changed = db.execute(
                sa.update(chunks)
                .where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.QUEUED.value)
                .where(chunks.c.published_at < self._now() - older_than_s)
                .values(published_at=None)
            )
        return changed.rowcount

    def requeue_expired(self) -> list[ChunkId]:
        """Take back chunks whose lease ran out: their worker is dead, or cut off. Returns MOST_AT_ONCE at most.

        None while a database that was away is back for less than a renewal: nobody could renew, and all may live.
        """
        asked = time.monotonic()
        try:
            with writing(self.db) as db:
                db.execute(sa.select(1))
                now = time.monotonic()
                if now - asked > AWAY_LEASES * self.lease_s:
                    self._be_patient()
                return [] if now < self._patient_until else self._take_back(db)
        except BaseException:
            self._be_patient()
            raise

    def _be_patient(self) -> None:
        self._patient_until = time.monotonic() + RETURN_LEASES * self.lease_s

    def _take_back(self, db: Connection) -> list[ChunkId]:
        expired = (
            sa.select(chunks.c.job_id, chunks.c.number, chunks.c.attempt)
            .where(chunks.c.state == ChunkState.LEASED.value, chunks.c.leased_until < self._now())
            # In one order, so that two who do this at once do not wait for each other's jobs.
            .order_by(chunks.c.job_id, chunks.c.number)
            .limit(MOST_AT_ONCE)
            .with_for_update(skip_locked=True)
        )
        found = db.execute(expired).all()
        for job_id, number, attempt in found:
            chunk = ChunkId(job_id, number)
            self._end_attempts_before(db, chunk, attempt + 1)
            self._requeue(db, chunk, ErrorClass.WORKER_LOST, "the worker that ran this chunk was lost")
            self._complete_if_done(db, job_id)
        return [ChunkId(row.job_id, row.number) for row in found]

    def holders(self, job_id: str) -> list[sa.Row[Any]]:
        """Who holds a lease of the job that has not run out: worker_id, host and pid (None: unknown), seconds_left."""
        left = sa.func.max(chunks.c.leased_until - self._now()).label("seconds_left")
        query = (
            sa.select(chunks.c.worker_id, workers.c.host, workers.c.pid, left)
            .select_from(chunks.outerjoin(workers, workers.c.id == chunks.c.worker_id))
            .where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.LEASED.value)
            .where(chunks.c.leased_until > self._now())
            .group_by(chunks.c.worker_id, workers.c.host, workers.c.pid)
        )
        with reading(self.db) as db:
            return list(db.execute(query))

    def abandon_leases(self, job_id: str) -> int:
        """Take back every lease of an embedded job whose process is gone, without waiting for them to run out."""
        with writing(self.db) as db:
            lost = db.execute(
                sa.update(attempts)
                .where(attempts.c.job_id == job_id, attempts.c.ended_at.is_(None))
                .values(ended_at=self._now(), outcome="lost")
            )
            counting(db, model_of(db, job_id)).add("redeliveries", lost.rowcount)
            changed = db.execute(
                sa.update(chunks)
                .where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.LEASED.value)
                .values(state=ChunkState.QUEUED.value, leased_until=None, worker_id=None, published_at=None)
            )
        return changed.rowcount
