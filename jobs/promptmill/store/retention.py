"""Removing jobs that have ended: rows in batches, so that no other writer waits long."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.core.spans import span_s
from promptmill.database.engine import epoch, reading, writing
from promptmill.database.tables import batches, jobs, requests
from promptmill.errors import JobError
from promptmill.store import catalog, redaction
from promptmill.types import JobState

#: Rows removed in one transaction: under a second on SQLite.
BATCH_ROWS = 20_000


def remove(db: Engine, reference: str) -> str:
    """Remove a job with its requests, results and scores. Raises :class:`JobError` for one that has not ended.

    A removal that was cut off leaves fewer rows; asking again goes on.
    """
    job_id = str(catalog.find_job(db, reference).id)
    if not _remove_rows(db, job_id):
        state = catalog.find_job(db, job_id).state
        raise JobError(f"job {job_id} is {state}", hint=f"End it first: promptmill cancel {job_id}")
    return job_id


def _remove_rows(db: Engine, job_id: str) -> bool:
    """False for a job that has not ended, or was resumed or retried meanwhile: it keeps all its rows."""
    if not redaction.begin(db, job_id, "none"):
        return False
    with reading(db) as connection:
        last = connection.execute(sa.select(sa.func.max(requests.c.row)).where(requests.c.job_id == job_id)).scalar()
    for first in range(0, (last if last is not None else -1) + 1, BATCH_ROWS):
        with writing(db) as connection:
            # Results and retries go with their requests.
            connection.execute(
                sa.delete(requests).where(
                    requests.c.job_id == job_id, requests.c.row.between(first, first + BATCH_ROWS - 1)
                )
            )
    with writing(db) as connection:
        connection.execute(sa.update(batches).where(batches.c.job_id == job_id).values(job_id=None))
        connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))
    return True


def old_jobs(db: Engine, older_than: str, now: float | None = None) -> list[sa.Row[Any]]:
    """Jobs that ended longer ago than ``older_than``, such as 30d or 12h, the oldest first. ``now``: the database's."""
    limit = (epoch() if now is None else sa.literal(now)) - (span_s(older_than, "older_than") or 0.0)
    ended = [state.value for state in JobState if state.is_final]
    query = (
        sa.select(jobs.c.id, jobs.c.name, jobs.c.state, jobs.c.rows, jobs.c.store, jobs.c.finished_at)
        .where(jobs.c.state.in_(ended), sa.func.coalesce(jobs.c.finished_at, jobs.c.submitted_at) < limit)
        .order_by(jobs.c.id)
    )
    with reading(db) as connection:
        return list(connection.execute(query))


def collect(db: Engine, older_than: str, now: float | None = None) -> list[str]:
    """Remove :func:`old_jobs`; returns their ids."""
    return [job.id for job in old_jobs(db, older_than, now) if _remove_rows(db, job.id)]
