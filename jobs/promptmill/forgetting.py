"""Texts of an ended job go, its figures and scores stay: what ``--store`` and ``gc --keep-scores`` ask for."""

from __future__ import annotations

import logging

from sqlalchemy.engine import Engine

from promptmill import catalog
from promptmill.errors import PromptmillError
from promptmill.privacy import overdue, redact
from promptmill.score_runs import keep_scores
from promptmill.types import GONE, WITHOUT_TEXTS

_log = logging.getLogger(__name__)


def forget(db: Engine, job_id: str, how: str) -> bool:
    """Store the scores of the job's own task, then keep hashes of its texts ('hash') or nothing ('none').

    False for a job that has not ended, or goes on: whoever ends it asks again. Raises PromptmillError, and keeps all,
    for a task whose scores cannot be computed here.
    """
    job = catalog.find_job(db, job_id)
    if job.store in GONE.values():
        return True
    if job.store not in WITHOUT_TEXTS:
        keep_scores(db, job)
    return redact(db, job_id, how)


def forget_overdue(db: Engine) -> list[str]:
    """The same for jobs of the queue that asked for it and ended long enough ago; returns their ids.

    Any number of processes may do so at once. The time is a promise: texts go even where a function that scores them
    is not on this machine.
    """
    return [job_id for job_id, how in overdue(db) if _forget_in_time(db, job_id, how)]


def _forget_in_time(db: Engine, job_id: str, how: str) -> bool:
    try:
        return forget(db, job_id, how)
    except PromptmillError as problem:
        _log.warning("job %s loses its texts without scores: %s", job_id, problem.message)
        return redact(db, job_id, how)
