"""Texts of an ended job go, its figures and scores stay: what ``--store`` and ``gc --keep-scores`` ask for."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.database.engine import epoch, writing
from promptmill.database.tables import jobs
from promptmill.errors import DatabaseError, PromptmillError
from promptmill.scoring.runs import is_scored, keep_scores
from promptmill.store import catalog
from promptmill.store.redaction import FETCH_S, overdue, redact
from promptmill.types import GONE, WITHOUT_TEXTS

_log = logging.getLogger(__name__)

#: Seconds that a job is one process's to score and forget, unrenewed; and between two renewals.
CLAIM_S = 60.0
RENEW_S = 15.0

#: Seconds after the end of a job in which another process is to keep its scores: then texts go without.
UNSCORED_S = 2 * FETCH_S


def forget(db: Engine, job_id: str, how: str) -> bool:
    """Store the scores of the job's own task, then keep hashes of its texts ('hash') or nothing ('none').

    False for a job that has not ended, or goes on: the process that ends it asks again. Raises
    PromptmillError, and keeps all, for a task whose scores cannot be computed here.
    """
    job = catalog.find_job(db, job_id)
    if job.store in GONE.values():
        return True
    if job.store not in WITHOUT_TEXTS:
        keep_scores(db, job)
    return redact(db, job_id, how)


def forget_overdue(db: Engine, *, scoring: bool = True) -> list[str]:
    """The same for jobs of the queue that asked for it and ended long enough ago; returns their ids.

    Any number of processes may do so at once: each job is one's. ``scoring``: workers run no scorers; what has scores
    to keep they leave to others for a while. The time is a promise: texts go even where they could not be scored.
    """
    done = []
    for job_id, how, late_s in overdue(db):
        is_last = late_s >= UNSCORED_S - FETCH_S
        if not scoring and not is_last and not is_scored(db, catalog.find_job(db, job_id)):
            continue
        with claimed(db, job_id) as is_ours:
            if is_ours and (_forget_in_time(db, job_id, how, is_last) if scoring else redact(db, job_id, how)):
                done.append(job_id)
    return done


def _forget_in_time(db: Engine, job_id: str, how: str, is_last: bool) -> bool:
    """``is_last``: no other process, which may have what the scores need, is waited for any more."""
    try:
        return forget(db, job_id, how)
    except DatabaseError:
        raise
    except PromptmillError as problem:
        if not is_last:
            _log.warning("job %s is left to a process that can score it: %s", job_id, problem.message)
            return False
        _log.warning("job %s loses its texts without scores: %s", job_id, problem.message)
        return redact(db, job_id, how)


@contextlib.contextmanager
def claimed(db: Engine, job_id: str) -> Iterator[bool]:
    """Whether the job is ours to forget; kept so, by a thread, until the end."""
    if not _claim(db, job_id, anew=True):
        yield False
        return
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(db, job_id, ended), daemon=True)
    renewing.start()
    try:
        yield True
    finally:
        ended.set()
        renewing.join()
        with writing(db) as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(forgetting_until=None))


def _claim(db: Engine, job_id: str, *, anew: bool) -> bool:
    is_free = sa.or_(jobs.c.forgetting_until.is_(None), jobs.c.forgetting_until < epoch()) if anew else sa.true()
    with writing(db) as connection:
        changed = connection.execute(
            sa.update(jobs).where(jobs.c.id == job_id, is_free).values(forgetting_until=epoch() + CLAIM_S)
        )
    return changed.rowcount == 1


def _renew(db: Engine, job_id: str, ended: threading.Event) -> None:
    while not ended.wait(RENEW_S):
        # Should it fail, another process may do the same at the same time: the outcome is one.
        with contextlib.suppress(DatabaseError, sa.exc.SQLAlchemyError):
            _claim(db, job_id, anew=False)
