"""Leases: who may run a chunk, and for how long. The attempt number is the fencing token."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.engine import epoch
from promptmill.database.tables import attempts, chunks, jobs
from promptmill.ledger.conditions import claimable, held_by, in_turn, is_attempt
from promptmill.ledger.status import standing_of_job
from promptmill.ledger.values import OPEN_STATES, Standing, Terms
from promptmill.types import ChunkId, ChunkState, JobState, Lease

#: What a lease holds of its chunk, and of its job.
OF_CHUNK = (
    chunks.c.job_id, chunks.c.number, chunks.c.attempt, chunks.c.failures, chunks.c.worker_id, chunks.c.first_row,
    chunks.c.rows, chunks.c.published_at, chunks.c.leased_at,
)  # fmt: skip
OF_JOB = (jobs.c.model, jobs.c.model_fingerprint, jobs.c.context_tokens, jobs.c.priority)

# --- the statements of a claim, put together once: that costs more than sending them ---------------------------------

#: Gives the chunk to a worker, if it waits and its job is open.
TAKE = (
    sa.update(chunks)
    .where(chunks.c.job_id == sa.bindparam("of_job"), chunks.c.number == sa.bindparam("of_number"), claimable())
    .where(sa.exists().where(jobs.c.id == sa.bindparam("of_job"), jobs.c.state.in_(OPEN_STATES)))
    .values(
        state=ChunkState.LEASED.value,
        attempt=chunks.c.attempt + 1,
        worker_id=sa.bindparam("of_worker"),
        leased_at=epoch(),
        leased_until=epoch() + sa.bindparam("of_lease_s", type_=sa.Double()),
        not_before=None,
        published_at=sa.func.coalesce(chunks.c.published_at, epoch()),
    )
)

#: Starts the job with its first chunk.
START = (
    sa.update(jobs)
    .where(jobs.c.state == JobState.QUEUED.value)
    .values(
        state=JobState.RUNNING.value,
        started_at=sa.func.coalesce(jobs.c.started_at, epoch()),
        limit_from=sa.func.coalesce(jobs.c.limit_from, epoch()),
    )
)


def _insert_attempt(taken: sa.FromClause) -> sa.Insert:
    """Begins the attempt of each chunk in ``taken``, with its lease."""
    lease = sa.select(taken.c.job_id, taken.c.number, taken.c.attempt, taken.c.worker_id, taken.c.leased_at)
    return sa.insert(attempts).from_select(["job_id", "number", "attempt", "worker_id", "started_at"], lease)


def _claim_statement() -> sa.Select[Any]:
    """All of a claim as one statement, for PostgreSQL: one way to the server and back."""
    taken = TAKE.returning(*OF_CHUNK).cte("taken")
    begun = _insert_attempt(taken).cte("begun")
    started = START.where(jobs.c.id == taken.c.job_id).cte("started")
    return sa.select(taken, *OF_JOB).join(jobs, jobs.c.id == taken.c.job_id).add_cte(begun, started)


CLAIM = _claim_statement()

#: The chunk that was asked for, once it is taken.
TAKEN = (
    sa.select(*OF_CHUNK, *OF_JOB)
    .join(jobs, jobs.c.id == chunks.c.job_id)
    .where(chunks.c.job_id == sa.bindparam("of_job"), chunks.c.number == sa.bindparam("of_number"))
)
BEGIN = _insert_attempt(TAKEN.subquery())
START_ASKED = START.where(jobs.c.id == sa.bindparam("of_job"))


def claim(db: Connection, terms: Terms, chunk: ChunkId, worker_id: str) -> Lease | None:
    """Lease the chunk; None when another worker has it, it is done, or its job is not open."""
    asked = {
        "of_job": chunk.job_id, "of_number": chunk.number, "of_worker": worker_id, "of_lease_s": terms.lease_s
    }  # fmt: skip
    sent_at = time.monotonic()
    found = None
    if db.dialect.name == "postgresql":
        found = db.execute(CLAIM, asked).one_or_none()
    elif db.execute(TAKE, asked).rowcount == 1:
        db.execute(BEGIN, asked)
        db.execute(START_ASKED, asked)
        found = db.execute(TAKEN, asked).one()
    told_at = time.monotonic()
    if found is None:
        return None
    # What is admitted from now on is admitted after the claim, whatever happened to a clock before.
    terms.clock.learn(found.leased_at, sent_at, told_at)
    return _lease(found)


def _lease(found: Any) -> Lease:
    return Lease(
        chunk=ChunkId(found.job_id, found.number), attempt=found.attempt, failures=found.failures,
        worker_id=found.worker_id, first_row=found.first_row, rows=found.rows, model=found.model,
        enqueued_at=found.published_at, context_tokens=found.context_tokens, priority=found.priority,
        model_fingerprint=found.model_fingerprint,
    )  # fmt: skip


def claim_next(db: Connection, terms: Terms, job_id: str, worker_id: str) -> Lease | None:
    """Lease the first chunk of the job that may be run now; None when there is none."""
    for waiting in in_turn(job_id):
        number = db.execute(waiting.limit(1)).scalar()
        if number is not None:
            return claim(db, terms, ChunkId(job_id, number), worker_id)
    return None


def claim_of_model(
    db: Connection, terms: Terms, model: str, worker_id: str, fingerprint: str | None = None
) -> Lease | None:
    """Lease a chunk of the most urgent open job of ``model``; None when none may be run now.

    ``fingerprint``: of the model that the worker has, where it knows: no job of another one is taken.
    """
    another = sa.false() if fingerprint is None else jobs.c.model_fingerprint != fingerprint
    found = db.execute(
        sa.select(chunks.c.job_id, chunks.c.number)
        .join(jobs, jobs.c.id == chunks.c.job_id)
        .where(jobs.c.model == model, jobs.c.mode == "queue", jobs.c.state.in_(OPEN_STATES))
        .where(sa.or_(jobs.c.model_fingerprint.is_(None), ~another))
        .where(claimable(), chunks.c.published_at.is_not(None))
        .order_by(jobs.c.priority, jobs.c.id, chunks.c.number)
        .limit(1)
    ).one_or_none()
    return None if found is None else claim(db, terms, ChunkId(found.job_id, found.number), worker_id)


def adopt(db: Connection, terms: Terms, worker_id: str, known: Collection[Lease]) -> Lease | None:
    """A lease that this worker has and does not know of, for the answer to its claim was lost; None without one.

    ``known``: the leases that it does know of.
    """
    running = {(lease.chunk, lease.attempt) for lease in known}
    own = db.execute(
        sa.select(*OF_CHUNK, *OF_JOB)
        .join(jobs, jobs.c.id == chunks.c.job_id)
        .where(chunks.c.state == ChunkState.LEASED.value, chunks.c.worker_id == worker_id)
    )
    for found in own.all():
        lease = _lease(found)
        if (lease.chunk, lease.attempt) not in running:
            return lease if _prolong(db, terms, lease) else None
    return None


def renew(db: Connection, terms: Terms, lease: Lease) -> Standing:
    """Prolong the lease, and learn whether its work is still wanted."""
    return standing_of_job(db, lease.chunk.job_id) if _prolong(db, terms, lease) else Standing.LOST


def _prolong(db: Connection, terms: Terms, lease: Lease) -> bool:
    """False when the lease was overtaken."""
    changed = db.execute(sa.update(chunks).where(held_by(lease)).values(leased_until=epoch() + terms.lease_s))
    return changed.rowcount == 1


def answered_by(db: Connection, lease: Lease, fingerprint: str | None, environment: Mapping[str, str]) -> bool:
    """Note on the attempt which model answers it, and what else changes its answers.

    A job whose model nothing has named so far is for this one from now on. False, and nothing noted, when the job is
    for another model. May be said again.
    """
    wanted = lease.model_fingerprint
    if wanted is None and fingerprint is not None:
        wanted = _settle_model(db, lease.chunk.job_id, fingerprint)
    if wanted != fingerprint:
        return False
    noted = {"model_fingerprint": fingerprint, "environment": json.dumps(environment, sort_keys=True)}
    db.execute(sa.update(attempts).where(is_attempt(lease)).values(noted))
    return True


def _settle_model(db: Connection, job_id: str, fingerprint: str) -> str | None:
    """The fingerprint of the job's model: the first one that was said."""
    db.execute(
        sa.update(jobs)
        .where(jobs.c.id == job_id, jobs.c.model_fingerprint.is_(None))
        .values(model_fingerprint=fingerprint)
    )
    return db.execute(sa.select(jobs.c.model_fingerprint).where(jobs.c.id == job_id)).scalar()
