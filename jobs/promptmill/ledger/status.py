"""What is asked about jobs, and changes nothing."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.engine import epoch
from promptmill.database.tables import attempts, chunks, jobs, workers
from promptmill.errors import JobError
from promptmill.ledger.conditions import held_by
from promptmill.ledger.values import OPEN_STATES, UNENDED, JobSpec, Progress, Standing
from promptmill.types import ChunkState, JobState, Lease


def progress(db: Connection, job_id: str) -> Progress:
    """Counts of the job, from its chunks: cheap for any number of rows."""
    job = db.execute(sa.select(jobs.c.state, jobs.c.rows, jobs.c.stop_reason).where(jobs.c.id == job_id)).one_or_none()
    if job is None:
        raise JobError(f"there is no job {job_id}")
    sums = (sa.func.coalesce(sa.func.sum(each), 0) for each in (chunks.c.ok, chunks.c.errors, chunks.c.output_tokens))
    ok, errors, tokens = db.execute(sa.select(*sums).where(chunks.c.job_id == job_id)).one()
    return Progress(JobState(job.state), job.rows, int(ok), int(errors), int(tokens), job.stop_reason)


def counts_of(db: Connection, job_id: str) -> tuple[int, int]:
    """Answers and errors of a job so far."""
    ok, errors = db.execute(
        sa.select(sa.func.sum(chunks.c.ok), sa.func.sum(chunks.c.errors)).where(chunks.c.job_id == job_id)
    ).one()
    return int(ok or 0), int(errors or 0)


def job_spec(db: Connection, job_id: str) -> JobSpec:
    """The parts of a job that turn its rows into requests."""
    columns = (
        jobs.c.model, jobs.c.task_text, jobs.c.task_name, jobs.c.system_prompt, jobs.c.sampling,
        jobs.c.use_cache, jobs.c.api_key_id,
    )  # fmt: skip
    job = db.execute(sa.select(*columns).where(jobs.c.id == job_id)).one_or_none()
    if job is None:
        raise JobError(f"there is no job {job_id}")
    return JobSpec(
        job_id, job.model, job.task_text, job.task_name, job.system_prompt, json.loads(job.sampling),
        job.use_cache, job.api_key_id or "",
    )  # fmt: skip


def model_of(db: Connection, job_id: str) -> tuple[str, str | None] | None:
    """The job's model and its fingerprint, where that is known; None when there is no such job."""
    job = db.execute(sa.select(jobs.c.model, jobs.c.model_fingerprint).where(jobs.c.id == job_id)).one_or_none()
    return None if job is None else (job.model, job.model_fingerprint)


def model_name(db: Connection, job_id: str) -> str:
    """The model of a job that is there."""
    return str(db.execute(sa.select(jobs.c.model).where(jobs.c.id == job_id)).scalar_one())


def open_jobs(db: Connection, mode: str) -> list[sa.Row[Any]]:
    """Jobs of a mode ('queue' or 'embedded') that are queued or running.

    With ``id``, ``model``, ``model_fingerprint``, ``priority`` and ``waited_s``.

    ``waited_s``: seconds since one of its chunks last ran, or since it was submitted; none while one runs.
    """
    # A chunk that runs has an attempt without an end, however long ago it was leased.
    seen = sa.func.max(sa.func.coalesce(attempts.c.ended_at, epoch()))
    last_seen = sa.select(seen).where(attempts.c.job_id == jobs.c.id).scalar_subquery()
    return list(
        db.execute(
            sa.select(
                jobs.c.id, jobs.c.model, jobs.c.model_fingerprint, jobs.c.priority,
                (epoch() - sa.func.coalesce(last_seen, jobs.c.submitted_at)).label("waited_s"),
            )
            .where(jobs.c.state.in_(OPEN_STATES), jobs.c.mode == mode)
            .order_by(jobs.c.priority, jobs.c.id)
        )
    )  # fmt: skip


def waiting_requests(db: Connection, mode: str, api_key_id: str | None = None) -> int:
    """Rows of unended jobs of a mode ('queue' or 'embedded'), or of one API key's, that have no result yet."""
    waiting = sa.func.sum(chunks.c.rows - chunks.c.ok - chunks.c.errors - chunks.c.moved)
    query = sa.select(waiting).join(jobs, jobs.c.id == chunks.c.job_id)
    query = query.where(jobs.c.state.in_(UNENDED), jobs.c.mode == mode)
    if api_key_id is not None:
        query = query.where(jobs.c.api_key_id == api_key_id)
    return int(db.execute(query).scalar() or 0)


def is_open(db: Connection, job_id: str) -> bool:
    """Whether the job is queued or running."""
    return standing_of_job(db, job_id) is Standing.HELD


def standing_of_job(db: Connection, job_id: str) -> Standing:
    """What a worker may do that holds a lease of the job."""
    state = db.execute(sa.select(jobs.c.state).where(jobs.c.id == job_id)).scalar()
    if state in OPEN_STATES:
        return Standing.HELD
    return Standing.PAUSED if state == JobState.PAUSED.value else Standing.UNWANTED


def standing(db: Connection, lease: Lease) -> Standing:
    """Whether the lease is still ours and its work wanted: the cheap question between renewals."""
    held = db.execute(sa.select(sa.exists().where(held_by(lease)))).scalar()
    return standing_of_job(db, lease.chunk.job_id) if held else Standing.LOST


def holders(db: Connection, job_id: str) -> list[sa.Row[Any]]:
    """Who holds a lease of the job that has not run out: worker_id, host and pid (None: unknown), seconds_left."""
    left = sa.func.max(chunks.c.leased_until - epoch()).label("seconds_left")
    return list(
        db.execute(
            sa.select(chunks.c.worker_id, workers.c.host, workers.c.pid, left)
            .select_from(chunks.outerjoin(workers, workers.c.id == chunks.c.worker_id))
            .where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.LEASED.value)
            .where(chunks.c.leased_until > epoch())
            .group_by(chunks.c.worker_id, workers.c.host, workers.c.pid)
        )
    )
