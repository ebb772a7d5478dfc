"""The end of an attempt: its chunk is done, given back, or failed, or its worker was lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.counting import counting
from promptmill.database.engine import epoch
from promptmill.database.tables import attempts, chunks
from promptmill.ledger.conditions import held_by, is_attempt, lock_held
from promptmill.ledger.jobs import complete_if_done
from promptmill.ledger.results import add_counters, generated, record, unstored
from promptmill.ledger.splitting import requeue
from promptmill.ledger.status import model_name
from promptmill.ledger.values import Terms, storable
from promptmill.types import ChunkState, EngineCounters, ErrorClass, Lease, Ok, Result

log = logging.getLogger("promptmill.ledger")


def finish(
    db: Connection,
    terms: Terms,
    lease: Lease,
    counters: EngineCounters | None = None,
    slots: int | None = None,
    last: Sequence[tuple[Result, int]] = (),
    *,
    maybe_stored: bool = False,
) -> bool:
    """Record the ``last`` results and close the chunk, and its job when it was the last chunk.

    False when the lease was overtaken, or rows of the chunk have no result; results that count are kept.
    """
    if maybe_stored and last:
        last = unstored(db, lease, last)
    record(db, terms, lease, last)
    changed = db.execute(
        sa.update(chunks)
        .where(held_by(lease), chunks.c.ok + chunks.c.errors + chunks.c.moved == chunks.c.rows)
        .values(state=ChunkState.DONE.value, leased_until=None)
    )
    if changed.rowcount != 1:
        if not last:
            tell_overtaken(db, lease, "ended")
        return False
    end_attempt(db, lease, "done", counters, slots)
    complete_if_done(db, lease.chunk.job_id)
    return True


def release(
    db: Connection,
    lease: Lease,
    counters: EngineCounters | None = None,
    slots: int | None = None,
    refused: Sequence[tuple[Result, int]] = (),
) -> bool:
    """Give the chunk back: this worker stops, or the work is not wanted. It does not count as a failed attempt.

    ``refused``: answers that may not have been taken, because the job had ended. The tokens of those that were not
    are wasted.
    """
    if counters is not None and refused:
        lost = sum(generated(each) for each, _ in unstored(db, lease, refused) if isinstance(each, Ok))
        counters = counters.plus(EngineCounters(wasted_tokens=lost))
    changed = db.execute(
        sa.update(chunks)
        .where(held_by(lease))
        .values(state=ChunkState.QUEUED.value, leased_until=None, worker_id=None, published_at=None)
    )
    end_attempt(db, lease, "released", counters, slots)
    if changed.rowcount != 1:
        tell_overtaken(db, lease, "was given back")
    return changed.rowcount == 1


def fail(db: Connection, terms: Terms, lease: Lease, error_class: ErrorClass, message: str) -> bool:
    """The attempt failed as a whole (its host died): try again later, or split the chunk, or give the row up."""
    if not lock_held(db, lease):
        tell_overtaken(db, lease, "failed")
        return False
    end_attempt(db, lease, "failed")
    requeue(db, terms, lease.chunk, error_class, storable(message))
    complete_if_done(db, lease.chunk.job_id)
    return True


def end_attempt(
    db: Connection,
    lease: Lease,
    outcome: str,
    counters: EngineCounters | None = None,
    slots: int | None = None,
) -> None:
    ended = db.execute(
        sa.update(attempts)
        .where(is_attempt(lease), attempts.c.ended_at.is_(None))
        .values(ended_at=epoch(), outcome=outcome, slots=slots)
    )
    # An attempt ends once, and its counters come with its end: a worker that was not told that its commit went
    # through says it all again.
    if ended.rowcount == 1:
        add_counters(db, lease, counters)
        counting(db, lease.model, lease.worker_id).add("redeliveries", outcome == "failed")


def lose_attempts(db: Connection, job_id: str, which: sa.ColumnElement[bool]) -> None:
    """End those attempts of the job that are open: a worker that died, or is cut off, closes none."""
    lost = db.execute(
        sa.update(attempts)
        .where(attempts.c.job_id == job_id, which, attempts.c.ended_at.is_(None))
        .values(ended_at=epoch(), outcome="lost")
    )
    counting(db, model_name(db, job_id)).add("redeliveries", lost.rowcount)


def tell_overtaken(db: Connection, lease: Lease, what: str) -> None:
    """Say in the log that an attempt was taken for lost while it ran. One that ended before is no trouble."""
    if db.execute(sa.select(attempts.c.outcome).where(is_attempt(lease))).scalar() == "lost":
        log.warning(
            "chunk %s/%d: attempt %d of %s %s after its lease was lost",
            lease.chunk.job_id, lease.chunk.number, lease.attempt, lease.worker_id, what,
        )  # fmt: skip
