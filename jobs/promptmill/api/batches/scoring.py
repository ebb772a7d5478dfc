"""Scores of ended jobs, made in children beside the batches: no key's large job holds up another key's."""

from __future__ import annotations

import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

from sqlalchemy.engine import Engine, Row

from promptmill.api.batches import work
from promptmill.api.batches.passing import PASSING
from promptmill.api.http.evaluation import for_report
from promptmill.core import child_processes
from promptmill.core.child_processes import ChildLimits
from promptmill.core.settings import Settings
from promptmill.errors import PromptmillError, UnknownName, first_line
from promptmill.scoring.forgetting import UNSCORED_S, claimed
from promptmill.scoring.runs import is_scored, unscored
from promptmill.store import catalog
from promptmill.store.redaction import FETCH_S, overdue, redact

log = logging.getLogger("promptmill.api.batches.batches")

#: Jobs that are scored at one time, one of each key.
AT_ONCE = 2

#: Seconds after the end of a client's job within which its scores are kept: the window of a batch.
SCORED_WITHIN_S = 86_400.0

#: For a task file of this machine: as long as its texts wait for scores. What a client sent has less.
OWN_TASK = ChildLimits(UNSCORED_S - FETCH_S, 8_192)


@dataclass(frozen=True, slots=True)
class _Due:
    """A job to be scored. ``how``: what then becomes of its texts, where it asked for that."""

    job: Row[Any]
    how: str | None

    @property
    def key(self) -> tuple[str, float, str | None]:
        """A retry ends the job anew."""
        return self.job.id, self.job.finished_at, self.how


class ScoreKeeper:
    """One server's part; any number of servers may do so at once."""

    def __init__(self, settings: Settings, db: Engine) -> None:
        self._settings = settings
        self._db = db
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="score")
        self._lock = Lock()
        #: API keys one of whose jobs is scored now, and when a job of each was last taken.
        self._busy: set[str | None] = set()
        self._turns: dict[str | None, float] = {}
        #: Jobs that were looked at: of some there is nothing to keep.
        self._seen: set[tuple[str, float, str | None]] = set()

    def step(self) -> None:
        """Begin with jobs that are due, one of a key at a time. Keys take turns. Waits for none of them."""
        found = self._due()
        never = float("-inf")
        found.sort(key=lambda due: (self._turns.get(due.job.api_key_id, never), due.job.id))
        with self._lock:
            self._seen &= {due.key for due in found}
            for due in found:
                owner = due.job.api_key_id
                if len(self._busy) < AT_ONCE and owner not in self._busy and due.key not in self._seen:
                    self._busy.add(owner)
                    self._turns[owner] = time.monotonic()
                    self._threads.submit(self._keep, due)

    def close(self) -> None:
        """Begin with no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _due(self) -> list[_Due]:
        found = {job.id: _Due(job, None) for job in unscored(self._db, SCORED_WITHIN_S)}
        for job_id, how, _ in overdue(self._db):
            with contextlib.suppress(UnknownName):
                job = catalog.find_job(self._db, job_id)
                # What has no score to be kept is the housekeeping's.
                if not is_scored(self._db, job):
                    found[job_id] = _Due(job, how)
        return list(found.values())

    def _keep(self, due: _Due) -> None:
        try:
            if due.how is None:
                self._score(due.job)
            else:
                with claimed(self._db, due.job.id) as is_ours:
                    if is_ours:
                        self._score(due.job)
                        # The time is a promise: texts go even where they could not be scored.
                        redact(self._db, due.job.id, due.how)
        except PASSING as problem:
            log.warning("scores of job %s wait: %s", due.job.id, first_line(problem))
        except Exception:
            log.exception("scores of job %s wait", due.job.id)
        else:
            with self._lock:
                self._seen.add(due.key)
        finally:
            with self._lock:
                self._busy.discard(due.job.api_key_id)

    def _score(self, job: Row[Any]) -> None:
        """What cannot be scored once will not be the next time either."""
        limits = for_report(job.rows) if job.task_folder is None else OWN_TASK
        try:
            child_processes.call(limits, work.score, self._settings, job.id)
        except PASSING:
            raise
        except PromptmillError as problem:
            log.warning("job %s is not scored: %s", job.id, first_line(problem))
        except Exception as problem:
            # Its message may hold an answer.
            log.error("job %s is not scored: %s", job.id, type(problem).__name__)
