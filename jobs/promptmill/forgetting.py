"""Texts of an ended job go, its figures and scores stay: what ``--store`` and ``gc --keep-scores`` ask for."""

from __future__ import annotations

import logging

from sqlalchemy.engine import Engine

from promptmill import catalog
from promptmill.errors import PromptmillError
from promptmill.privacy import DONE, overdue, redact
from promptmill.score_runs import keep_scores

_log = logging.getLogger(__name__)


def forget(db: Engine, job_id: str, how: str) -> None:
    """Store the scores of the job's own task, then keep hashes of its texts ('hash') or nothing ('none').

    Raises PromptmillError, and keeps all, for a task whose scores cannot be computed here.
    """
    job = catalog.find_job(db, job_id)
    if job.store in DONE.values():
        return
    keep_scores(db, job)
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
