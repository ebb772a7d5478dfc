"""Leases of workers that are gone. Any number of reconcilers and commands may take them back at once."""

from __future__ import annotations

import time

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database.engine import epoch, writing
from promptmill.database.tables import attempts, chunks
from promptmill.ledger.endings import lose_attempts
from promptmill.ledger.jobs import complete_if_done
from promptmill.ledger.splitting import requeue
from promptmill.ledger.values import Terms
from promptmill.types import ChunkId, ChunkState, ErrorClass

#: Seconds that the database may take to begin a transaction, in leases, before it counts as having been away.
AWAY_LEASES = 0.1

#: Seconds of its time, in leases, that those who hold chunks then have for renewing them: more than they wait between
#: two renewals.
RETURN_LEASES = 0.3

#: Chunks taken back in one transaction, a quarter of a second's work on SQLite: all who write wait for it.
MOST_AT_ONCE = 500


class ExpiredLeases:
    """Takes back chunks whose lease ran out, but not while the database was away so that none could be renewed."""

    def __init__(self, engine: Engine, terms: Terms) -> None:
        self._engine = engine
        self._terms = terms
        #: By ``time.monotonic()``: until then no lease is taken for lost.
        self._patient_until = 0.0

    def requeue(self) -> list[ChunkId]:
        """Take back chunks whose lease ran out: their worker is dead, or cut off. Returns MOST_AT_ONCE at most.

        None while a database that was away is back for less than a renewal: no worker could renew, and all may live.
        """
        asked = time.monotonic()
        try:
            with writing(self._engine) as db:
                db.execute(sa.select(1))
                now = time.monotonic()
                if now - asked > AWAY_LEASES * self._terms.lease_s:
                    self._be_patient()
                return [] if now < self._patient_until else take_back_expired(db, self._terms)
        except BaseException:
            self._be_patient()
            raise

    def _be_patient(self) -> None:
        self._patient_until = time.monotonic() + RETURN_LEASES * self._terms.lease_s


def take_back_expired(db: Connection, terms: Terms) -> list[ChunkId]:
    """Put chunks whose lease ran out back, or split them; returns MOST_AT_ONCE at most."""
    expired = (
        sa.select(chunks.c.job_id, chunks.c.number)
        .where(chunks.c.state == ChunkState.LEASED.value, chunks.c.leased_until < epoch())
        # In one order, so that two who do this at once do not wait for each other's jobs.
        .order_by(chunks.c.job_id, chunks.c.number)
        .limit(MOST_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    found = [ChunkId(job_id, number) for job_id, number in db.execute(expired).all()]
    for chunk in found:
        lose_attempts(db, chunk.job_id, attempts.c.number == chunk.number)
        requeue(db, terms, chunk, ErrorClass.WORKER_LOST, "the worker that ran this chunk was lost")
        complete_if_done(db, chunk.job_id)
    return found


def abandon_leases(db: Connection, job_id: str) -> int:
    """Take back every lease of an embedded job whose process is gone, without waiting for them to run out."""
    lose_attempts(db, job_id, sa.true())
    changed = db.execute(
        sa.update(chunks)
        .where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.LEASED.value)
        .values(state=ChunkState.QUEUED.value, leased_until=None, worker_id=None, published_at=None)
    )
    return changed.rowcount
