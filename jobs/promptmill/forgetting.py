"""Texts of an ended job go, its figures and scores stay: what ``--store`` and ``gc --keep-scores`` ask for."""

from __future__ import annotations

import logging
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from promptmill import catalog
from promptmill.database import reading, writing
from promptmill.errors import PromptmillError
from promptmill.privacy import DONE, overdue, redact
from promptmill.score_runs import append_score_run
from promptmill.scorers.scoring import judge_of
from promptmill.tables import score_runs, scores
from promptmill.task_file import Task, parse_task

_log = logging.getLogger(__name__)


def forget(db: Engine, job_id: str, how: str) -> None:
    """Store the scores of the job's own task, then keep hashes of its texts ('hash') or nothing ('none').

    Raises PromptmillError, and keeps all, for a task whose scores cannot be computed here.
    """
    job = catalog.find_job(db, job_id)
    if job.store in DONE.values():
        return
    _keep_scores(db, job)
    redact(db, job_id, how)


def forget_overdue(db: Engine) -> list[str]:
    """The same for jobs of the queue that asked for it and ended long enough ago; returns their ids.

    Any number of processes may do so at once. The time is a promise: texts go even where a function that scores them
    is not on this machine.
    """
    found = overdue(db)
    for job_id, how in found:
        try:
            forget(db, job_id, how)
        except PromptmillError as problem:
            _log.warning("job %s loses its texts without scores: %s", job_id, problem.message)
            redact(db, job_id, how)
    return [job_id for job_id, _ in found]


def _keep_scores(db: Engine, job: Row[Any]) -> None:
    """A score run by the job's own task, unless it has one."""
    if judge_of(job) is None:
        return
    task = parse_task(job.task_text, job.task_name or "task", job.task_folder)
    if _runs(db, job.id, task):
        return
    run = append_score_run(db, job, task)
    if _runs(db, job.id, task)[0] != run.id:
        # Another process was first, and may have begun to take texts away while this one still read them.
        with writing(db) as connection:
            connection.execute(sa.delete(scores).where(scores.c.score_run_id == run.id))
            connection.execute(sa.delete(score_runs).where(score_runs.c.id == run.id))


def _runs(db: Engine, job_id: str, task: Task) -> list[str]:
    """Finished score runs by the task, the first one first."""
    query = sa.select(score_runs.c.id).where(
        score_runs.c.job_id == job_id, score_runs.c.figures.is_not(None), score_runs.c.task_sha256 == task.sha256
    )
    with reading(db) as connection:
        return list(connection.execute(query.order_by(score_runs.c.number, score_runs.c.id)).scalars())
