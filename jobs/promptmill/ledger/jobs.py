"""Jobs: how they start, pause, go on and end. Each change of a job's state is one conditional statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database.engine import epoch, reading, writing
from promptmill.database.tables import chunks, jobs
from promptmill.errors import JobError
from promptmill.ledger.conditions import lock_held
from promptmill.ledger.status import counts_of
from promptmill.ledger.values import OPEN_STATES, UNENDED, guard_verdict, storable
from promptmill.types import WITHOUT_TEXTS, ChunkState, JobState, Lease


def cancel(db: Connection, job_id: str) -> bool:
    """End the job: nothing new is started and what runs is dropped. False when it had ended already."""
    return _close(db, job_id, JobState.CANCELLED, UNENDED, "cancelled")


def stop(db: Connection, job_id: str, reason: str, lease: Lease | None = None) -> bool:
    """End the job as failed because it cannot go on (its model does not load). False when it had ended already.

    ``lease``: of the worker that says so. One that was overtaken has no say any more: False.
    """
    if lease is not None and not lock_held(db, lease):
        return False
    return _close(db, job_id, JobState.FAILED, OPEN_STATES, reason)


def pause(db: Connection, job_id: str) -> bool:
    """Start nothing more of the job until it is resumed; what runs may end. False when it was not open."""
    changed = db.execute(
        sa.update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state.in_(OPEN_STATES))
        .values(state=JobState.PAUSED.value, paused_at=epoch())
    )
    return changed.rowcount == 1


def resume(db: Connection, job_id: str) -> JobState:
    """Open the job again; returns the state it had. Its time limit goes on where it was paused or stopped.

    One that is open stays as it is. A job whose rows all have a result is completed instead. Raises
    :class:`JobError` when it had completed, was cancelled or expired, or has failed and lost its prompts or is past
    its deadline.
    """
    before = lock_job(db, job_id)
    rows = db.execute(sa.select(jobs.c.rows).where(jobs.c.id == job_id)).scalar_one()
    ended = (JobState.COMPLETED, JobState.CANCELLED, JobState.EXPIRED)
    if before in ended or (before.is_final and sum(counts_of(db, job_id)) == rows):
        raise JobError(f"job {job_id} is {before.value}: there is nothing to resume")
    if before.is_final:
        refuse_rerun(db, job_id)
    if before.value in OPEN_STATES:
        return before
    stood_still_s = epoch() - sa.func.coalesce(jobs.c.paused_at, jobs.c.finished_at, epoch())
    reopen(db, job_id, jobs.c.limit_from + stood_still_s)
    complete_if_done(db, job_id)
    return before


def lock_job(db: Connection, job_id: str) -> JobState:
    """Let one transaction at a time number chunks of the job, or end it. Returns its state.

    It is NO KEY UPDATE: a chunk that is changed twice in a transaction makes PostgreSQL check its foreign key and
    share-lock the job's key, and two of them would wait for each other's full lock.
    """
    locked = sa.select(jobs.c.state).where(jobs.c.id == job_id).with_for_update(key_share=True)
    return JobState(db.execute(locked).scalar_one())


def reopen(db: Connection, job_id: str, limit_from: Any) -> None:
    """``limit_from``: when the job's time limit began; None starts it anew when the job does.

    The caller holds the job's lock.
    """
    opened = db.execute(
        sa.update(jobs)
        .where(jobs.c.id == job_id)
        .values(state=JobState.QUEUED.value, finished_at=None, stop_reason=None, paused_at=None, limit_from=limit_from)
    )
    assert opened.rowcount == 1, f"job {job_id} is gone, although it is locked"


def refuse_rerun(db: Connection, job_id: str) -> None:
    """Raise JobError for an ended job that has no prompts, or would expire at once. The caller holds its lock."""
    asked = sa.select(jobs.c.store, (jobs.c.deadline_at < epoch()).label("overdue"))
    job = db.execute(asked.where(jobs.c.id == job_id)).one()
    if job.store in WITHOUT_TEXTS:
        raise JobError(
            f"job {job_id} has lost its prompts, as --store, gc or rm asked: nothing of it is run again",
            hint="Submit its dataset anew.",
        )
    if job.overdue:
        raise JobError(f"job {job_id} is past its deadline: nothing of it is run again", hint="Submit it anew.")


def _close(
    db: Connection,
    job_id: str,
    state: JobState,
    allowed: Sequence[str],
    reason: str | None,
    condition: sa.ColumnElement[bool] | None = None,
) -> bool:
    """End the job if it is in one of the ``allowed`` states and the ``condition`` holds."""
    changed = db.execute(
        sa.update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state.in_(allowed), sa.true() if condition is None else condition)
        .values(state=state.value, finished_at=epoch(), stop_reason=storable(reason) if reason else reason)
    )
    return changed.rowcount == 1


def complete_if_done(db: Connection, job_id: str) -> None:
    """Close the job when no chunk is left. The lock keeps two last chunks from missing each other.

    Not taken while chunks wait: all workers of a job would queue for it. A transaction that stalls between this
    look and its commit, until the rest of the job is done, is put right by :func:`complete_jobs`.
    """
    waiting = sa.exists().where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.QUEUED.value)
    if db.execute(sa.select(waiting)).scalar():
        return
    lock_job(db, job_id)
    left = sa.exists().where(chunks.c.job_id == job_id, chunks.c.state != ChunkState.DONE.value)
    if db.execute(sa.select(left)).scalar():
        return
    ok, _ = counts_of(db, job_id)
    state = JobState.COMPLETED if ok else JobState.FAILED
    _close(db, job_id, state, UNENDED, None if ok else "every row failed")


def judge_guard(db: Connection, job_id: str) -> None:
    """End a job that has failed too often."""
    job = db.execute(sa.select(jobs.c.max_errors, jobs.c.skipped).where(jobs.c.id == job_id)).one()
    ok, errors = counts_of(db, job_id)
    # Lines that were known to be bad, and skipped on purpose, prove nothing against the job.
    reason = guard_verdict(job.max_errors, ok, errors - job.skipped)
    if reason:
        _close(db, job_id, JobState.FAILED, OPEN_STATES, reason)


def complete_jobs(engine: Engine) -> None:
    """Close jobs whose chunks are all done and whose last one did not notice it."""
    left = sa.exists().where(chunks.c.job_id == jobs.c.id, chunks.c.state != ChunkState.DONE.value)
    done = sa.select(jobs.c.id).where(jobs.c.state.in_(UNENDED), ~left)
    with reading(engine) as db:
        found = db.execute(done).scalars().all()
    for job_id in found:
        with writing(engine) as db:
            complete_if_done(db, job_id)


def expire_overdue(engine: Engine) -> list[str]:
    """End jobs that are past their deadline, waited too long to begin, or ran too long. Returns their ids."""
    reasons = {
        "past its deadline": jobs.c.deadline_at < epoch(),
        "not begun in time": sa.and_(jobs.c.expires_at < epoch(), jobs.c.started_at.is_(None)),
        # The limit of a paused job stands still.
        "over its time limit": sa.and_(
            jobs.c.limit_from + jobs.c.time_limit_s < epoch(), jobs.c.state != JobState.PAUSED.value
        ),
    }
    ended = []
    for reason, is_due in reasons.items():
        due = sa.select(jobs.c.id).where(jobs.c.state.in_(UNENDED), is_due)
        with reading(engine) as db:
            found = db.execute(due).scalars().all()
        for job_id in found:
            # One job a transaction, judged again: two who look at once would wait for each other's jobs.
            with writing(engine) as db:
                if _close(db, job_id, JobState.EXPIRED, UNENDED, reason, is_due):
                    ended.append(job_id)
    return ended
