"""Jobs: how they start, pause, go on and end, and what is counted of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.engine import reading, writing
from promptmill.database.tables import attempts, chunks, jobs
from promptmill.errors import JobError
from promptmill.ledger.base import LedgerBase, counts_of, held_by, storable
from promptmill.ledger.values import OPEN_STATES, Progress, Standing, guard_verdict
from promptmill.types import WITHOUT_TEXTS, ChunkState, JobState, Lease

#: States from which a job can still be ended.
UNENDED = (*OPEN_STATES, JobState.PAUSED.value)


def waiting_requests(db: Connection, mode: str, api_key_id: str | None = None) -> int:
    """Rows of unended jobs of a mode ('queue' or 'embedded'), or of one API key's, that have no result yet."""
    waiting = sa.func.sum(chunks.c.rows - chunks.c.ok - chunks.c.errors - chunks.c.moved)
    query = sa.select(waiting).join(jobs, jobs.c.id == chunks.c.job_id)
    query = query.where(jobs.c.state.in_(UNENDED), jobs.c.mode == mode)
    if api_key_id is not None:
        query = query.where(jobs.c.api_key_id == api_key_id)
    return int(db.execute(query).scalar() or 0)


class Jobs(LedgerBase):
    """Each change of a job's state is one conditional statement."""

    def cancel(self, job_id: str) -> bool:
        """End the job: nothing new is started and what runs is dropped. False when it had ended already."""
        with writing(self.db) as db:
            return self._close(db, job_id, JobState.CANCELLED, UNENDED, "cancelled")

    def stop(self, job_id: str, reason: str, lease: Lease | None = None) -> bool:
        """End the job as failed because it cannot go on (its model does not load). False when it had ended already.

        ``lease``: of the worker that says so. One that was overtaken has no say any more: False.
        """
        with writing(self.db) as db:
            if lease is not None:
                held = db.execute(sa.select(chunks.c.number).where(held_by(lease)).with_for_update()).scalar()
                if held is None:
                    return False
            return self._close(db, job_id, JobState.FAILED, OPEN_STATES, reason)

    def pause(self, job_id: str) -> bool:
        """Start nothing more of the job until it is resumed; what runs may end. False when it was not open."""
        with writing(self.db) as db:
            changed = db.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id, jobs.c.state.in_(OPEN_STATES))
                .values(state=JobState.PAUSED.value, paused_at=self._now())
            )
        return changed.rowcount == 1

    def resume(self, job_id: str) -> JobState:
        """Open the job again; returns the state it had. Its time limit goes on where it was paused or stopped.

        One that is open stays as it is. A job whose rows all have a result is completed instead. Raises
        :class:`JobError` when it had completed, was cancelled or expired, or has failed and lost its prompts or is past
        its deadline.
        """
        with writing(self.db) as db:
            job = db.execute(
                sa.select(jobs.c.state, jobs.c.rows).where(jobs.c.id == job_id).with_for_update(key_share=True)
            ).one()
            before = JobState(job.state)
            ended = (JobState.COMPLETED, JobState.CANCELLED, JobState.EXPIRED)
            if before in ended or (before.is_final and sum(counts_of(db, job_id)) == job.rows):
                raise JobError(f"job {job_id} is {before.value}: there is nothing to resume")
            if before.is_final:
                self._refuse_rerun(db, job_id)
            if before.value in OPEN_STATES:
                return before
            stood_still_s = self._now() - sa.func.coalesce(jobs.c.paused_at, jobs.c.finished_at, self._now())
            self._reopen(db, job_id, jobs.c.limit_from + stood_still_s)
            self._complete_if_done(db, job_id)
        return before

    def _reopen(self, db: Connection, job_id: str, limit_from: Any) -> None:
        """``limit_from``: when the job's time limit began; None starts it anew when the job does."""
        values = {"state": JobState.QUEUED.value, "finished_at": None, "stop_reason": None, "paused_at": None}
        db.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**values, limit_from=limit_from))

    def _refuse_rerun(self, db: Connection, job_id: str) -> None:
        """Raise JobError for an ended job that has no prompts, or would expire at once. The caller holds its lock."""
        asked = sa.select(jobs.c.store, (jobs.c.deadline_at < self._now()).label("overdue"))
        job = db.execute(asked.where(jobs.c.id == job_id)).one()
        if job.store in WITHOUT_TEXTS:
            raise JobError(
                f"job {job_id} has lost its prompts, as --store, gc or rm asked: nothing of it is run again",
                hint="Submit its dataset anew.",
            )
        if job.overdue:
            raise JobError(f"job {job_id} is past its deadline: nothing of it is run again", hint="Submit it anew.")

    def _start_job(self, db: Connection, job_id: str) -> None:
        db.execute(
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state == JobState.QUEUED.value)
            .values(
                state=JobState.RUNNING.value,
                started_at=sa.func.coalesce(jobs.c.started_at, self._now()),
                limit_from=sa.func.coalesce(jobs.c.limit_from, self._now()),
            )
        )

    def _close(
        self,
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
            .values(state=state.value, finished_at=self._now(), stop_reason=storable(reason) if reason else reason)
        )
        return changed.rowcount == 1

    def _complete_if_done(self, db: Connection, job_id: str) -> None:
        """Close the job when no chunk is left. The lock keeps two last chunks from missing each other.

        Not taken while chunks wait: all workers of a job would queue for it. A transaction that stalls between this
        look and its commit, until the rest of the job is done, is put right by :meth:`complete_jobs`.
        """
        waiting = sa.exists().where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.QUEUED.value)
        if db.execute(sa.select(waiting)).scalar():
            return
        self._lock_job(db, job_id)
        left = sa.exists().where(chunks.c.job_id == job_id, chunks.c.state != ChunkState.DONE.value)
        if db.execute(sa.select(left)).scalar():
            return
        ok, _ = counts_of(db, job_id)
        state = JobState.COMPLETED if ok else JobState.FAILED
        self._close(db, job_id, state, UNENDED, None if ok else "every row failed")

    def _judge_guard(self, db: Connection, job_id: str) -> None:
        job = db.execute(sa.select(jobs.c.max_errors, jobs.c.skipped).where(jobs.c.id == job_id)).one()
        ok, errors = counts_of(db, job_id)
        # Lines that were known to be bad, and skipped on purpose, prove nothing against the job.
        reason = guard_verdict(job.max_errors, ok, errors - job.skipped)
        if reason:
            self._close(db, job_id, JobState.FAILED, OPEN_STATES, reason)

    def complete_jobs(self) -> None:
        """Close jobs whose chunks are all done and whose last one did not notice it."""
        left = sa.exists().where(chunks.c.job_id == jobs.c.id, chunks.c.state != ChunkState.DONE.value)
        done = sa.select(jobs.c.id).where(jobs.c.state.in_(UNENDED), ~left)
        with reading(self.db) as db:
            found = db.execute(done).scalars().all()
        for job_id in found:
            with writing(self.db) as db:
                self._complete_if_done(db, job_id)

    # --- time limits -------------------------------------------------------------------------------------------------

    def expire_overdue(self) -> list[str]:
        """End jobs that are past their deadline, waited too long to begin, or ran too long. Returns their ids."""
        now = self._now()
        reasons = {
            "past its deadline": jobs.c.deadline_at < now,
            "not begun in time": sa.and_(jobs.c.expires_at < now, jobs.c.started_at.is_(None)),
            # The limit of a paused job stands still.
            "over its time limit": sa.and_(
                jobs.c.limit_from + jobs.c.time_limit_s < now, jobs.c.state != JobState.PAUSED.value
            ),
        }
        ended = []
        for reason, is_due in reasons.items():
            due = sa.select(jobs.c.id).where(jobs.c.state.in_(UNENDED), is_due)
            with reading(self.db) as db:
                found = db.execute(due).scalars().all()
            for job_id in found:
                # One job a transaction, judged again: two who look at once would wait for each other's jobs.
                with writing(self.db) as db:
                    if self._close(db, job_id, JobState.EXPIRED, UNENDED, reason, is_due):
                        ended.append(job_id)
        return ended

    # --- questions ---------------------------------------------------------------------------------------------------

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

    def open_jobs(self, mode: str) -> list[sa.Row[Any]]:
        """Jobs of a mode ('queue' or 'embedded') that are queued or running.

        With ``id``, ``model``, ``model_fingerprint``, ``priority`` and ``waited_s``.

        ``waited_s``: seconds since one of its chunks last ran, or since it was submitted; none while one runs.
        """
        # A chunk that runs has an attempt without an end, however long ago it was leased.
        seen = sa.func.max(sa.func.coalesce(attempts.c.ended_at, self._now()))
        last_seen = sa.select(seen).where(attempts.c.job_id == jobs.c.id).scalar_subquery()
        with reading(self.db) as db:
            return list(
                db.execute(
                    sa.select(
                        jobs.c.id, jobs.c.model, jobs.c.model_fingerprint, jobs.c.priority,
                        (self._now() - sa.func.coalesce(last_seen, jobs.c.submitted_at)).label("waited_s"),
                    )
                    .where(jobs.c.state.in_(OPEN_STATES), jobs.c.mode == mode)
                    .order_by(jobs.c.priority, jobs.c.id)
                )
            )  # fmt: skip

    def is_open(self, job_id: str) -> bool:
        """Whether the job is queued or running."""
        with reading(self.db) as db:
            return self._standing(db, job_id) is Standing.HELD
