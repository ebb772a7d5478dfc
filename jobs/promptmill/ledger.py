"""The state machine of jobs, chunks and results, and the only writer of states.

Every change is one conditional statement whose row count is checked. A lease's attempt number is its fencing token: a
worker that was overtaken changes nothing. Times are the database's, never a worker's.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database import copy_rows, epoch, reading, writing
from promptmill.errors import JobError
from promptmill.tables import attempts, chunks, jobs, requests, results
from promptmill.types import (
    ChunkId,
    ChunkState,
    EngineCounters,
    ErrorClass,
    JobState,
    Lease,
    Ok,
    Result,
)

#: Seconds a chunk stays ours unrenewed. Five renewals may be missed.
LEASE_S = 30.0

#: Attempts of a chunk before it is split to find the request that ends its host.
MAX_ATTEMPTS = 3

#: Pieces that a chunk is split into; fewer rows than this become chunks of one.
SPLIT_PIECES = 8

#: Seconds before a failed chunk is tried again, doubled by each attempt.
BACKOFF_S = 1.0

#: Longest of these waits.
LONGEST_BACKOFF_S = 60.0

#: Further attempts of a single request whose worker was lost, before it is given up.
LOST_WORKERS = 3

#: The default guard: a job whose first results are all errors is plainly wrong.
GUARD_ROWS = 50

OPEN_STATES = (JobState.QUEUED.value, JobState.RUNNING.value)

RESULT_COLUMNS = (
    "job_id", "row", "state", "text", "finish_reason", "error_class", "error_message", "prompt_tokens", "cached_tokens",
    "output_tokens", "max_tokens", "enqueued_at", "received_at", "admitted_at", "first_token_at", "finished_at",
    "committed_at", "attempt", "worker_id", "chunk",
)  # fmt: skip


class Standing(enum.Enum):
    """What a worker may do with its lease."""

    HELD = "held"
    #: Somebody else has the chunk.
    LOST = "lost"
    #: The job was cancelled, paused or stopped by its guard: drop the chunk.
    UNWANTED = "unwanted"


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a worker needs to know of a job to turn its rows into requests."""

    job_id: str
    model: str
    task_text: str | None
    task_name: str | None
    system_prompt: str | None
    sampling: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A row of ``requests`` that has no result yet."""

    row: int
    custom_id: str
    input: dict[str, Any]
    meta: dict[str, Any] | None
    sampling: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of a job while it runs."""

    state: JobState
    rows: int
    ok: int
    errors: int
    output_tokens: int
    stop_reason: str | None

    @property
    def done(self) -> int:
        return self.ok + self.errors


class Ledger:
    """The ledger over one database. ``clock`` replaces the database's clock in tests."""

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

    def _now(self) -> Any:
        return sa.literal(self._clock(), sa.Double()) if self._clock else epoch()

    # --- leases ------------------------------------------------------------------------------------------------------

    def claim(self, chunk: ChunkId, worker_id: str) -> Lease | None:
        """Lease the chunk; None when somebody else has it, it is done, or its job is not open."""
        with writing(self.db) as db:
            return self._claim(db, chunk, worker_id)

    def claim_next(self, job_id: str, worker_id: str) -> Lease | None:
        """Lease the first chunk of the job that may be run now; None when there is none."""
        with writing(self.db) as db:
            number = db.execute(
                sa.select(chunks.c.number)
                .where(chunks.c.job_id == job_id, self._claimable())
                .order_by(chunks.c.number)
                .limit(1)
            ).scalar()
            return None if number is None else self._claim(db, ChunkId(job_id, number), worker_id)

    def _claimable(self) -> sa.ColumnElement[bool]:
        """A chunk whose lease ran out is not: :meth:`requeue_expired` counts its failure first."""
        return sa.and_(
            chunks.c.state == ChunkState.QUEUED.value,
            sa.or_(chunks.c.not_before.is_(None), chunks.c.not_before <= self._now()),
        )

    def _claim(self, db: Connection, chunk: ChunkId, worker_id: str) -> Lease | None:
        is_open = sa.exists().where(jobs.c.id == chunk.job_id, jobs.c.state.in_(OPEN_STATES))
        claimed = db.execute(
            sa.update(chunks)
            .where(_is(chunk), self._claimable(), is_open)
            .values(
                state=ChunkState.LEASED.value,
                attempt=chunks.c.attempt + 1,
                worker_id=worker_id,
                leased_until=self._now() + self.lease_s,
                not_before=None,
                published_at=sa.func.coalesce(chunks.c.published_at, self._now()),
            )
            .returning(chunks.c.attempt, chunks.c.failures, chunks.c.first_row, chunks.c.rows, chunks.c.published_at)
        ).one_or_none()
        if claimed is None:
            return None
        job = db.execute(
            sa.select(jobs.c.model, jobs.c.state, jobs.c.context_tokens).where(jobs.c.id == chunk.job_id)
        ).one()
        if job.state == JobState.QUEUED.value:
            self._start_job(db, chunk.job_id)
        db.execute(
            sa.insert(attempts).values(
                job_id=chunk.job_id,
                number=chunk.number,
                attempt=claimed.attempt,
                worker_id=worker_id,
                started_at=self._now(),
            )
        )
        return Lease(
            chunk=chunk, attempt=claimed.attempt, failures=claimed.failures, worker_id=worker_id,
            first_row=claimed.first_row, rows=claimed.rows, model=job.model, enqueued_at=claimed.published_at,
            context_tokens=job.context_tokens,
        )  # fmt: skip

    def _start_job(self, db: Connection, job_id: str) -> None:
        db.execute(
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state == JobState.QUEUED.value)
            .values(state=JobState.RUNNING.value, started_at=sa.func.coalesce(jobs.c.started_at, self._now()))
        )

    def _end_attempts_before(self, db: Connection, chunk: ChunkId, attempt: int) -> None:
        """A chunk taken over from a dead worker leaves an attempt that nobody closed."""
        db.execute(
            sa.update(attempts)
            .where(
                attempts.c.job_id == chunk.job_id, attempts.c.number == chunk.number, attempts.c.attempt < attempt,
                attempts.c.ended_at.is_(None),
            )
            .values(ended_at=self._now(), outcome="lost")
        )  # fmt: skip

    def renew(self, lease: Lease) -> Standing:
        """Prolong the lease, and learn whether its work is still wanted."""
        with writing(self.db) as db:
            changed = db.execute(
                sa.update(chunks).where(_held_by(lease)).values(leased_until=self._now() + self.lease_s)
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
            held = db.execute(sa.select(sa.exists().where(_held_by(lease)))).scalar()
            return self._standing(db, lease.chunk.job_id) if held else Standing.LOST

    def _standing(self, db: Connection, job_id: str) -> Standing:
        state = db.execute(sa.select(jobs.c.state).where(jobs.c.id == job_id)).scalar()
        return Standing.HELD if state in OPEN_STATES else Standing.UNWANTED

    # --- what a worker reads -----------------------------------------------------------------------------------------

    def job_spec(self, job_id: str) -> JobSpec:
        """The parts of a job that turn its rows into requests."""
        with reading(self.db) as db:
            columns = (jobs.c.model, jobs.c.task_text, jobs.c.task_name, jobs.c.system_prompt, jobs.c.sampling)
            job = db.execute(sa.select(*columns).where(jobs.c.id == job_id)).one_or_none()
        if job is None:
            raise JobError(f"there is no job {job_id}")
        return JobSpec(job_id, job.model, job.task_text, job.task_name, job.system_prompt, json.loads(job.sampling))

    def pending(self, lease: Lease) -> list[StoredRequest]:
        """The leased rows that have no result, in order."""
        job_id = lease.chunk.job_id
        asked = (
            sa.select(requests.c.row, requests.c.custom_id, requests.c.input, requests.c.meta, requests.c.sampling)
            .where(requests.c.job_id == job_id, _in_range(requests.c.row, lease))
            .order_by(requests.c.row)
        )
        # Two ranges of two primary keys: planners of databases without statistics get a join of them wrong.
        answered = sa.select(results.c.row).where(results.c.job_id == job_id, _in_range(results.c.row, lease))
        with reading(self.db) as db:
            done = set(db.execute(answered).scalars())
            rows = [row for row in db.execute(asked) if row.row not in done]
        return [
            StoredRequest(
                row,
                custom_id,
                json.loads(text),
                json.loads(meta) if meta else None,
                json.loads(sampling) if sampling else {},
            )
            for row, custom_id, text, meta, sampling in rows
        ]

    # --- results -----------------------------------------------------------------------------------------------------

    def record(self, lease: Lease, batch: Sequence[tuple[Result, int]]) -> int:
        """Store results, each with the ``max_tokens`` it ran under, in one transaction. Returns how many were stored.

        Nothing is stored when the lease was overtaken, or when its job has ended meanwhile.
        """
        if not batch:
            return 0
        with writing(self.db) as db:
            return self._record(db, lease, batch)

    def _record(self, db: Connection, lease: Lease, batch: Sequence[tuple[Result, int]]) -> int:
        if not batch or not self._hold(db, lease):
            return 0
        now = db.execute(sa.select(self._now())).scalar()
        assert now is not None
        copy_rows(db, results, RESULT_COLUMNS, [_result_row(lease, each, limit, now) for each, limit in batch])
        answers = [each for each, _ in batch if isinstance(each, Ok)]
        failures = len(batch) - len(answers)
        db.execute(
            sa.update(chunks)
            .where(_held_by(lease))
            .values(
                ok=chunks.c.ok + len(answers),
                errors=chunks.c.errors + failures,
                output_tokens=chunks.c.output_tokens + sum(each.usage.output_tokens for each in answers),
                leased_until=now + self.lease_s,
            )
        )
        if failures:
            self._judge_guard(db, lease.chunk.job_id)
        return len(batch)

    def _hold(self, db: Connection, lease: Lease) -> bool:
        """Lock the leased chunk for this transaction; False when the lease was overtaken or the job has ended.

        A paused job still takes the results of what was running.
        """
        held = db.execute(sa.select(chunks.c.number).where(_held_by(lease)).with_for_update()).scalar()
        state = db.execute(sa.select(jobs.c.state).where(jobs.c.id == lease.chunk.job_id)).scalar()
        return held is not None and state is not None and not JobState(state).is_final

    def _judge_guard(self, db: Connection, job_id: str) -> None:
        job = db.execute(sa.select(jobs.c.max_errors, jobs.c.skipped).where(jobs.c.id == job_id)).one()
        ok, errors = _counts(db, job_id)
        # Lines that were known to be bad, and skipped on purpose, prove nothing against the job.
        reason = guard_verdict(job.max_errors, ok, errors - job.skipped)
        if reason:
            self._close(db, job_id, JobState.FAILED, OPEN_STATES, reason)

    # --- the end of an attempt ---------------------------------------------------------------------------------------

    def finish(
        self,
        lease: Lease,
        counters: EngineCounters | None = None,
        slots: int | None = None,
        last: Sequence[tuple[Result, int]] = (),
    ) -> bool:
        """Record the ``last`` results and close the chunk, and its job when it was the last chunk: one transaction.

        False when the lease was overtaken, or rows of the chunk have no result; results that count are kept.
        """
        with writing(self.db) as db:
            self._record(db, lease, last)
            changed = db.execute(
                sa.update(chunks)
                .where(_held_by(lease), chunks.c.ok + chunks.c.errors == chunks.c.rows)
                .values(state=ChunkState.DONE.value, leased_until=None)
            )
            if changed.rowcount != 1:
                return False
            self._end_attempt(db, lease, "done", counters, slots)
            self._complete_if_done(db, lease.chunk.job_id)
        return True

    def release(self, lease: Lease, counters: EngineCounters | None = None, slots: int | None = None) -> bool:
        """Give the chunk back: this worker stops, or the work is not wanted. It does not count as a failed attempt."""
        with writing(self.db) as db:
            changed = db.execute(
                sa.update(chunks)
                .where(_held_by(lease))
                .values(state=ChunkState.QUEUED.value, leased_until=None, worker_id=None, published_at=None)
            )
            self._end_attempt(db, lease, "released", counters, slots)
        return changed.rowcount == 1

    def fail(self, lease: Lease, error_class: ErrorClass, message: str) -> bool:
        """The attempt failed as a whole (its host died): try again later, or split the chunk, or give the row up."""
        with writing(self.db) as db:
            if db.execute(sa.select(chunks.c.number).where(_held_by(lease)).with_for_update()).scalar() is None:
                return False
            self._end_attempt(db, lease, "failed", None, None)
            self._requeue(db, lease.chunk, error_class, message)
            self._complete_if_done(db, lease.chunk.job_id)
        return True

    def _end_attempt(
        self, db: Connection, lease: Lease, outcome: str, counters: EngineCounters | None, slots: int | None
    ) -> None:
        values: dict[str, Any] = {"ended_at": self._now(), "outcome": outcome, "slots": slots}
        if counters is not None:
            values |= {
                name: getattr(counters, name)
                for name in (
                    "steps", "prefill_s", "decode_s", "overhead_s", "idle_s", "starved_s", "prefill_tokens",
                    "decode_tokens", "wasted_tokens", "peak_active", "peak_kv_cells",
                )
            }  # fmt: skip
        db.execute(
            sa.update(attempts)
            .where(
                attempts.c.job_id == lease.chunk.job_id, attempts.c.number == lease.chunk.number,
                attempts.c.attempt == lease.attempt, attempts.c.ended_at.is_(None),
            )
            .values(values)
        )  # fmt: skip

    def _requeue(self, db: Connection, chunk: ChunkId, error_class: ErrorClass, message: str) -> None:
        """Put a chunk whose attempt failed back, whole or in pieces. The caller holds its row."""
        row = db.execute(sa.select(chunks).where(_is(chunk))).one()
        failures = row.failures + 1
        # Workers are stopped for many reasons; a lost one proves less than a host that died under one request.
        last = self._max_attempts + (LOST_WORKERS if error_class is ErrorClass.WORKER_LOST and row.rows == 1 else 0)
        if row.ok + row.errors == row.rows:
            db.execute(sa.update(chunks).where(_is(chunk)).values(state=ChunkState.DONE.value, leased_until=None))
        elif failures < last:
            delay = min(BACKOFF_S * 2 ** (failures - 1), LONGEST_BACKOFF_S)
            self._put_back(db, chunk, message, failures, not_before=self._now() + delay)
        elif row.rows > 1:
            self._put_back(db, chunk, message, failures, not_before=None)
            self._split(db, chunk)
        else:
            self._give_up(db, chunk, row.first_row, row.attempt, error_class, message)

    def _put_back(self, db: Connection, chunk: ChunkId, message: str, failures: int, not_before: Any) -> None:
        db.execute(
            sa.update(chunks)
            .where(_is(chunk))
            .values(
                state=ChunkState.QUEUED.value, leased_until=None, worker_id=None, published_at=None,
                not_before=not_before, last_error=message, failures=failures,
            )
        )  # fmt: skip

    def _split(self, db: Connection, chunk: ChunkId) -> None:
        """Replace a chunk by pieces, so that one poisonous request parts from its neighbours.

        A piece has one attempt left before it is split in turn: the search for the bad request costs few crashes.
        The chunk itself stays with no rows, for its attempts to refer to; its fencing number is never used again.
        """
        # Two chunks of one job split at once would choose the same numbers.
        db.execute(sa.select(jobs.c.id).where(jobs.c.id == chunk.job_id).with_for_update(key_share=True))
        parent = db.execute(sa.select(chunks).where(_is(chunk))).one()
        last = db.execute(sa.select(sa.func.max(chunks.c.number)).where(chunks.c.job_id == chunk.job_id)).scalar()
        assert last is not None
        for number, span in enumerate(_pieces(parent.first_row, parent.rows), start=last + 1):
            ok, errors, tokens = _counts_between(db, chunk.job_id, span)
            state = ChunkState.DONE if ok + errors == len(span) else ChunkState.QUEUED
            db.execute(
                sa.insert(chunks).values(
                    job_id=chunk.job_id,
                    number=number,
                    first_row=span.start,
                    rows=len(span),
                    state=state.value,
                    attempt=0,
                    failures=self._max_attempts - 1,
                    ok=ok,
                    errors=errors,
                    output_tokens=tokens,
                    last_error=parent.last_error,
                )
            )
        db.execute(
            sa.update(chunks)
            .where(_is(chunk))
            .values(state=ChunkState.DONE.value, rows=0, ok=0, errors=0, output_tokens=0)
        )

    def _give_up(
        self, db: Connection, chunk: ChunkId, row: int, attempt: int, error_class: ErrorClass, message: str
    ) -> None:
        """One request, alone, failed for the last time: it ends as an error."""
        values = {
            "job_id": chunk.job_id, "row": row, "state": "error", "error_class": error_class.value,
            "error_message": message, "committed_at": self._now(), "attempt": attempt, "chunk": chunk.number,
        }  # fmt: skip
        db.execute(sa.insert(results).values(values))
        db.execute(
            sa.update(chunks)
            .where(_is(chunk))
            .values(state=ChunkState.DONE.value, leased_until=None, errors=chunks.c.errors + 1, last_error=message)
        )
        self._judge_guard(db, chunk.job_id)

    # --- jobs --------------------------------------------------------------------------------------------------------

    def _complete_if_done(self, db: Connection, job_id: str) -> None:
        """Close the job when no chunk is left. The lock keeps two last chunks from missing each other.

        It is NO KEY UPDATE: a chunk that is changed twice in a transaction makes PostgreSQL check its foreign key and
        share-lock the job's key, and two of them would wait for each other's full lock.
        """
        db.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id).with_for_update(key_share=True))
        left = sa.exists().where(chunks.c.job_id == job_id, chunks.c.state != ChunkState.DONE.value)
        if db.execute(sa.select(left)).scalar():
            return
        ok, _ = _counts(db, job_id)
        state = JobState.COMPLETED if ok else JobState.FAILED
        reason = None if ok else "every row failed"
        self._close(db, job_id, state, (*OPEN_STATES, JobState.PAUSED.value), reason)

    def _close(self, db: Connection, job_id: str, state: JobState, allowed: Sequence[str], reason: str | None) -> bool:
        changed = db.execute(
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state.in_(allowed))
            .values(state=state.value, finished_at=self._now(), stop_reason=reason)
        )
        return changed.rowcount == 1

    def cancel(self, job_id: str) -> bool:
        """End the job: nothing new is started and what runs is dropped. False when it had ended already."""
        with writing(self.db) as db:
            allowed = (*OPEN_STATES, JobState.PAUSED.value)
            return self._close(db, job_id, JobState.CANCELLED, allowed, "cancelled")

    def stop(self, job_id: str, reason: str) -> bool:
        """End the job as failed because it cannot go on (its model does not load). False when it had ended already."""
        with writing(self.db) as db:
            return self._close(db, job_id, JobState.FAILED, OPEN_STATES, reason)

    def pause(self, job_id: str) -> bool:
        """Stop starting anything of the job until it is resumed. False when it was not open."""
        with writing(self.db) as db:
            changed = db.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id, jobs.c.state.in_(OPEN_STATES))
                .values(state=JobState.PAUSED.value)
            )
        return changed.rowcount == 1

    def resume(self, job_id: str) -> JobState:
        """Open the job again; returns the state it had.

        Raises :class:`JobError` when it completed or was cancelled.
        """
        with writing(self.db) as db:
            job = db.execute(
                sa.select(jobs.c.state, jobs.c.rows).where(jobs.c.id == job_id).with_for_update(key_share=True)
            ).one()
            before = JobState(job.state)
            ok, errors = _counts(db, job_id)
            if ok + errors == job.rows or before in (JobState.COMPLETED, JobState.CANCELLED, JobState.EXPIRED):
                raise JobError(f"job {job_id} is {before.value}: there is nothing to resume")
            db.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id)
                .values(state=JobState.QUEUED.value, finished_at=None, stop_reason=None)
            )
        return before

    def abandon_leases(self, job_id: str) -> int:
        """Take back every lease of an embedded job whose process is gone, without waiting for them to run out."""
        with writing(self.db) as db:
            changed = db.execute(
                sa.update(chunks)
                .where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.LEASED.value)
                .values(state=ChunkState.QUEUED.value, leased_until=None, worker_id=None, published_at=None)
            )
        return changed.rowcount

    def progress(self, job_id: str) -> Progress:
        """Counts of the job, from its chunks: cheap for any number of rows."""
        with reading(self.db) as db:
            job = db.execute(
                sa.select(jobs.c.state, jobs.c.rows, jobs.c.stop_reason).where(jobs.c.id == job_id)
            ).one_or_none()
            if job is None:
                raise JobError(f"there is no job {job_id}")
            total = db.execute(
                sa.select(
                    sa.func.coalesce(sa.func.sum(chunks.c.ok), 0),
                    sa.func.coalesce(sa.func.sum(chunks.c.errors), 0),
                    sa.func.coalesce(sa.func.sum(chunks.c.output_tokens), 0),
                ).where(chunks.c.job_id == job_id)
            ).one()
        return Progress(JobState(job.state), job.rows, int(total[0]), int(total[1]), int(total[2]), job.stop_reason)

    # --- publishing and recovery -------------------------------------------------------------------------------------

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
            ready = (
                sa.select(chunks.c.number)
                .where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.QUEUED.value)
                .where(chunks.c.published_at.is_(None))
                .where(sa.or_(chunks.c.not_before.is_(None), chunks.c.not_before <= self._now()))
                .order_by(chunks.c.number)
                .limit(room)
                .with_for_update(skip_locked=True)
            )
            numbers = list(db.execute(ready).scalars())
            if numbers:
                db.execute(
                    sa.update(chunks)
                    .where(chunks.c.job_id == job_id, chunks.c.number.in_(numbers))
                    .values(published_at=self._now())
                )
        return [ChunkId(job_id, number) for number in numbers]

    def unpublish_chunk(self, chunk: ChunkId) -> None:
        """Forget the message of a queued chunk: whoever read it does not run it."""
        with writing(self.db) as db:
            db.execute(
                sa.update(chunks).where(_is(chunk), chunks.c.state == ChunkState.QUEUED.value).values(published_at=None)
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
        """Take back chunks whose lease ran out: their worker is dead, or cut off. Returns them."""
        expired = (
            sa.select(chunks.c.job_id, chunks.c.number, chunks.c.attempt)
            .where(chunks.c.state == ChunkState.LEASED.value, chunks.c.leased_until < self._now())
            .with_for_update(skip_locked=True)
        )
        with writing(self.db) as db:
            found = db.execute(expired).all()
            for job_id, number, attempt in found:
                chunk = ChunkId(job_id, number)
                self._end_attempts_before(db, chunk, attempt + 1)
                self._requeue(db, chunk, ErrorClass.WORKER_LOST, "the worker that ran this chunk was lost")
                self._complete_if_done(db, job_id)
        return [ChunkId(row.job_id, row.number) for row in found]

    def open_jobs(self, mode: str) -> list[tuple[str, str, int]]:
        """Id, model and priority of the jobs of a mode ('queue' or 'embedded') that are queued or running."""
        with reading(self.db) as db:
            found = db.execute(
                sa.select(jobs.c.id, jobs.c.model, jobs.c.priority)
                .where(jobs.c.state.in_(OPEN_STATES), jobs.c.mode == mode)
                .order_by(jobs.c.priority, jobs.c.id)
            ).all()
        return [(row.id, row.model, row.priority) for row in found]

    def is_open(self, job_id: str) -> bool:
        """Whether the job is queued or running."""
        with reading(self.db) as db:
            return self._standing(db, job_id) is Standing.HELD


def guard_verdict(spec: str | None, ok: int, errors: int) -> str | None:
    """Why a job with these counts must stop; None when it may go on.

    ``spec`` is what ``--max-errors`` was given: a count, a share such as ``5%`` (judged from the 50th result on), or
    None for the default (the first 50 results all errors).
    """
    done = ok + errors
    if spec is None:
        return f"the first {done} rows all failed" if done >= GUARD_ROWS and ok == 0 else None
    if spec.endswith("%"):
        share = float(spec[:-1]) / 100
        too_many = done >= GUARD_ROWS and errors > share * done
    else:
        too_many = errors > int(spec)
    return f"{errors} of {done} rows failed, more than --max-errors {spec}" if too_many else None


def _is(chunk: ChunkId) -> sa.ColumnElement[bool]:
    return sa.and_(chunks.c.job_id == chunk.job_id, chunks.c.number == chunk.number)


def _held_by(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(_is(lease.chunk), chunks.c.state == ChunkState.LEASED.value, chunks.c.attempt == lease.attempt)


def _in_range(column: sa.Column[Any], lease: Lease) -> sa.ColumnElement[bool]:
    return column.between(lease.first_row, lease.first_row + lease.rows - 1)


def _counts(db: Connection, job_id: str) -> tuple[int, int]:
    """Answers and errors of a job so far."""
    ok, errors = db.execute(
        sa.select(sa.func.sum(chunks.c.ok), sa.func.sum(chunks.c.errors)).where(chunks.c.job_id == job_id)
    ).one()
    return int(ok or 0), int(errors or 0)


def _pieces(first_row: int, rows: int) -> list[range]:
    """A chunk's rows in SPLIT_PIECES runs, or one each."""
    size = max(1, -(-rows // SPLIT_PIECES))
    end = first_row + rows
    return [range(start, min(start + size, end)) for start in range(first_row, end, size)]


def _counts_between(db: Connection, job_id: str, span: range) -> tuple[int, int, int]:
    """Answers, errors and output tokens stored for the rows of ``span``."""
    is_ok = results.c.state == "ok"
    ok, total, tokens = db.execute(
        sa.select(
            sa.func.sum(sa.case((is_ok, 1), else_=0)),
            sa.func.count(),
            sa.func.sum(sa.case((is_ok, results.c.output_tokens), else_=0)),
        ).where(results.c.job_id == job_id, results.c.row.between(span.start, span.stop - 1))
    ).one()
    return int(ok or 0), int(total) - int(ok or 0), int(tokens or 0)


def _result_row(lease: Lease, result: Result, max_tokens: int, now: float) -> tuple[Any, ...]:
    """A row of ``results`` in the order of RESULT_COLUMNS."""
    usage, timing = result.usage, result.timing
    outcome: tuple[str | None, ...]
    if isinstance(result, Ok):
        outcome = ("ok", _storable(result.text), result.finish_reason.value, None, None)
    else:
        outcome = ("error", None, None, result.error_class.value, _storable(result.message))
    tokens = (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) if usage else (None, None, None)
    times = (
        (timing.received_at, timing.admitted_at, timing.first_token_at, timing.finished_at)
        if timing
        else (None, None, None, None)
    )
    return (
        lease.chunk.job_id, result.row, *outcome, *tokens, max_tokens, lease.enqueued_at, *times, now, lease.attempt,
        lease.worker_id, lease.chunk.number,
    )  # fmt: skip


def _storable(text: str) -> str:
    """PostgreSQL has no room for NUL in a text."""
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}") if "\x00" in text else text
