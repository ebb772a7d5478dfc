"""Leases: who may run a chunk, and for how long. The attempt number is the fencing token."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.engine import connecting, reading, writing
from promptmill.database.tables import FAILED, attempts, chunks, jobs
from promptmill.ledger.base import held_by, is_chunk
from promptmill.ledger.endings import Endings
from promptmill.ledger.results import is_attempt
from promptmill.ledger.values import OPEN_STATES, Standing
from promptmill.types import ChunkId, ChunkState, JobState, Lease


class Leases(Endings):
    """Taking, keeping and judging leases."""

    def claim(self, chunk: ChunkId, worker_id: str) -> Lease | None:
        """Lease the chunk; None when somebody else has it, it is done, or its job is not open."""
        if self.db.dialect.name == "postgresql":
            return self._claim_at_once(chunk, worker_id)
        with writing(self.db) as db:
            return self._claim(db, chunk, worker_id)

    def claim_next(self, job_id: str, worker_id: str) -> Lease | None:
        """Lease the first chunk of the job that may be run now; None when there is none."""
        with writing(self.db) as db:
            for waiting in self._in_turn(job_id):
                number = db.execute(waiting.where(self._claimable()).limit(1)).scalar()
                if number is not None:
                    return self._claim(db, ChunkId(job_id, number), worker_id)
            return None

    def _in_turn(self, job_id: str) -> tuple[sa.Select[Any], sa.Select[Any]]:
        """The numbers of chunks that wait: those that failed before, and the others.

        A request that ends its host is searched for to its end, in ever smaller pieces, before other chunks are begun:
        else each of these might lose a host too, and no row would ever be answered.
        """
        waiting = sa.select(chunks.c.number).where(chunks.c.job_id == job_id)
        is_new = sa.and_(chunks.c.state == ChunkState.QUEUED.value, chunks.c.failures == 0)
        return (
            waiting.where(FAILED).order_by(chunks.c.rows, chunks.c.number),
            waiting.where(is_new).order_by(chunks.c.number),
        )

    def claim_of_model(self, model: str, worker_id: str, fingerprint: str | None = None) -> Lease | None:
        """Lease a chunk of the most urgent open job of ``model``; None when none may be run now.

        ``fingerprint``: of the model that the worker has, where it knows: no job of another one is taken.
        """
        another = sa.false() if fingerprint is None else jobs.c.model_fingerprint != fingerprint
        with writing(self.db) as db:
            found = db.execute(
                sa.select(chunks.c.job_id, chunks.c.number)
                .join(jobs, jobs.c.id == chunks.c.job_id)
                .where(
                    jobs.c.model == model, jobs.c.mode == "queue", jobs.c.state.in_(OPEN_STATES), self._claimable(),
                    chunks.c.published_at.is_not(None), sa.or_(jobs.c.model_fingerprint.is_(None), ~another),
                )
                .order_by(jobs.c.priority, jobs.c.id, chunks.c.number)
                .limit(1)
            ).one_or_none()  # fmt: skip
            return None if found is None else self._claim(db, ChunkId(found.job_id, found.number), worker_id)

    def adopt(self, worker_id: str, known: Collection[Lease]) -> Lease | None:
        """A lease that this worker has and does not know of, for the answer to its claim was lost; None without one.

        ``known``: the leases that it does know of.
        """
        running = {(lease.chunk, lease.attempt) for lease in known}
        own = sa.select(chunks.c.job_id, chunks.c.number, chunks.c.attempt).where(
            chunks.c.state == ChunkState.LEASED.value, chunks.c.worker_id == worker_id
        )
        with writing(self.db) as db:
            for job_id, number, attempt in db.execute(own).all():
                chunk = ChunkId(job_id, number)
                if (chunk, attempt) not in running:
                    return self._prolong(db, chunk, attempt, worker_id)
        return None

    def _prolong(self, db: Connection, chunk: ChunkId, attempt: int, worker_id: str) -> Lease | None:
        kept = db.execute(
            sa.update(chunks)
            .where(is_chunk(chunk), chunks.c.state == ChunkState.LEASED.value, chunks.c.attempt == attempt)
            .values(leased_until=self._now() + self.lease_s)
            .returning(*_OF_CHUNK)
        ).one_or_none()
        return None if kept is None else self._begin(db, chunk, worker_id, kept)

    def model_of(self, job_id: str) -> tuple[str, str | None] | None:
        """The job's model and its fingerprint, where that is known; None when there is no such job."""
        with reading(self.db) as db:
            found = db.execute(sa.select(jobs.c.model, jobs.c.model_fingerprint).where(jobs.c.id == job_id))
            job = found.one_or_none()
        return None if job is None else (job.model, job.model_fingerprint)

    def answered_by(self, lease: Lease, fingerprint: str | None, environment: Mapping[str, str]) -> bool:
        """Note on the attempt which model answers it, and what else changes its answers.

        A job of which nobody has said so far which model it is for is for this one from now on. False, and nothing
        noted, when the job is for another model. May be said again.
        """
        with writing(self.db) as db:
            wanted = lease.model_fingerprint
            if wanted is None and fingerprint is not None:
                wanted = self._settle_model(db, lease.chunk.job_id, fingerprint)
            if wanted != fingerprint:
                return False
            values = {"model_fingerprint": fingerprint, "environment": json.dumps(environment, sort_keys=True)}
            db.execute(sa.update(attempts).where(is_attempt(lease)).values(values))
        return True

    def _settle_model(self, db: Connection, job_id: str, fingerprint: str) -> str | None:
        """The fingerprint of the job's model: the first one that was said."""
        db.execute(
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.model_fingerprint.is_(None))
            .values(model_fingerprint=fingerprint)
        )
        return db.execute(sa.select(jobs.c.model_fingerprint).where(jobs.c.id == job_id)).scalar()

    def _claimable(self) -> sa.ColumnElement[bool]:
        """A chunk whose lease ran out is not: :meth:`requeue_expired` counts its failure first."""
        return sa.and_(
            chunks.c.state == ChunkState.QUEUED.value,
            sa.or_(chunks.c.not_before.is_(None), chunks.c.not_before <= self._now()),
        )

    def _take(self, job_id: Any, number: Any, worker_id: Any) -> Any:
        """The one conditional statement of a claim."""
        is_open = sa.exists().where(jobs.c.id == job_id, jobs.c.state.in_(OPEN_STATES))
        return (
            sa.update(chunks)
            .where(chunks.c.job_id == job_id, chunks.c.number == number, self._claimable(), is_open)
            .values(
                state=ChunkState.LEASED.value,
                attempt=chunks.c.attempt + 1,
                worker_id=worker_id,
                leased_at=self._now(),
                leased_until=self._now() + self.lease_s,
                not_before=None,
                published_at=sa.func.coalesce(chunks.c.published_at, self._now()),
            )
            .returning(*_OF_CHUNK)
        )

    @cached_property
    def _claim_query(self) -> sa.Select[Any]:
        """A claim as one statement. Put together once: that costs more than sending it."""
        job_id: sa.BindParameter[str] = sa.bindparam("of_job")
        number: sa.BindParameter[int] = sa.bindparam("of_number")
        worker_id: sa.BindParameter[str] = sa.bindparam("of_worker")
        taken = self._take(job_id, number, worker_id).cte("taken")
        columns = ["job_id", "number", "attempt", "worker_id", "started_at"]
        row = sa.select(
            sa.cast(job_id, attempts.c.job_id.type), sa.cast(number, sa.Integer), taken.c.attempt,
            sa.cast(worker_id, attempts.c.worker_id.type), self._now(),
        )  # fmt: skip
        tried = sa.insert(attempts).from_select(columns, row).cte("tried")
        return sa.select(taken, *_JOB).join(jobs, jobs.c.id == job_id).add_cte(tried)

    def _claim_at_once(self, chunk: ChunkId, worker_id: str) -> Lease | None:
        """A claim that is its own transaction: one way to the server and back instead of five."""
        asked = {"of_job": chunk.job_id, "of_number": chunk.number, "of_worker": worker_id}
        with connecting(self.db), self.db.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            sent_at = time.monotonic()
            found = db.execute(self._claim_query, asked).one_or_none()
            taken_at = time.monotonic()
        if found is None:
            return None
        self._learn(found.leased_at, sent_at, taken_at)
        if found.state == JobState.QUEUED.value:
            with writing(self.db) as db:
                self._start_job(db, chunk.job_id)
        return _lease(chunk, worker_id, found, found, taken_at)

    def _claim(self, db: Connection, chunk: ChunkId, worker_id: str) -> Lease | None:
        sent_at = time.monotonic()
        claimed = db.execute(self._take(chunk.job_id, chunk.number, worker_id)).one_or_none()
        if claimed is None:
            return None
        self._learn(claimed.leased_at, sent_at, time.monotonic())
        db.execute(
            sa.insert(attempts).values(
                job_id=chunk.job_id,
                number=chunk.number,
                attempt=claimed.attempt,
                worker_id=worker_id,
                started_at=self._now(),
            )
        )
        return self._begin(db, chunk, worker_id, claimed)

    def _learn(self, leased_at: float, sent_at: float, told_at: float) -> None:
        """What is admitted from now on is admitted after the claim, whatever happened to a clock before."""
        if self._clock is None:
            self.database_clock.learn(leased_at, sent_at, told_at)

    def _begin(self, db: Connection, chunk: ChunkId, worker_id: str, claimed: Any) -> Lease:
        job = db.execute(sa.select(*_JOB).where(jobs.c.id == chunk.job_id)).one()
        if job.state == JobState.QUEUED.value:
            self._start_job(db, chunk.job_id)
        return _lease(chunk, worker_id, claimed, job, time.monotonic())

    def renew(self, lease: Lease) -> Standing:
        """Prolong the lease, and learn whether its work is still wanted."""
        with writing(self.db) as db:
            changed = db.execute(
                sa.update(chunks).where(held_by(lease)).values(leased_until=self._now() + self.lease_s)
            )
            if changed.rowcount != 1:
                return Standing.LOST
            return self._standing(db, lease.chunk.job_id)

    def is_suspect(self, lease: Lease) -> bool:
        """Whether this is the chunk's last attempt: it must run alone, so that its end is its own doing."""
        return lease.failures + 1 >= self._max_attempts

    def standing(self, lease: Lease) -> Standing:
        """Whether the lease is still ours and its work wanted: the cheap question between renewals."""
        with reading(self.db) as db:
            held = db.execute(sa.select(sa.exists().where(held_by(lease)))).scalar()
            return self._standing(db, lease.chunk.job_id) if held else Standing.LOST


#: What a lease holds of its chunk, and of its job.
_OF_CHUNK = (
    chunks.c.attempt, chunks.c.failures, chunks.c.first_row, chunks.c.rows, chunks.c.published_at, chunks.c.leased_at,
)  # fmt: skip
_JOB = (jobs.c.model, jobs.c.model_fingerprint, jobs.c.state, jobs.c.context_tokens, jobs.c.priority)


def _lease(chunk: ChunkId, worker_id: str, claimed: Any, job: Any, taken_at: float) -> Lease:
    return Lease(
        chunk=chunk, attempt=claimed.attempt, failures=claimed.failures, worker_id=worker_id,
        first_row=claimed.first_row, rows=claimed.rows, model=job.model, enqueued_at=claimed.published_at,
        context_tokens=job.context_tokens, priority=job.priority, model_fingerprint=job.model_fingerprint,
        taken_at=taken_at,
    )  # fmt: skip
