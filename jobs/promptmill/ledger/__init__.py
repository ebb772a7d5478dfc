"""The state machine of jobs, chunks and results, and the only writer of states.

A change is a function over a Connection, in the module of its subject: one conditional statement whose row count is
checked, or several that hold the chunk's lock. A lease's attempt number is its fencing token: a worker that was
overtaken changes nothing. Times are the database's, never a worker's. :class:`Ledger` gives each change a transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy.engine import Connection, Engine

from promptmill.database.clock import DatabaseClock
from promptmill.database.engine import reading, writing
from promptmill.database.refusals import connecting
from promptmill.ledger import endings, jobs, leases, publishing, recovery, results, retries, status
from promptmill.ledger.results import RESULT_COLUMNS
from promptmill.ledger.status import waiting_requests
from promptmill.ledger.values import (
    LEASE_S,
    MAX_ATTEMPTS,
    JobSpec,
    Progress,
    Standing,
    StoredRequest,
    Terms,
    guard_verdict,
)
from promptmill.types import ChunkId, EngineCounters, Lease, Result

__all__ = [
    "LEASE_S", "MAX_ATTEMPTS", "RESULT_COLUMNS", "JobSpec", "Ledger", "Progress", "Standing", "StoredRequest",
    "guard_verdict", "waiting_requests",
]  # fmt: skip

P = ParamSpec("P")
T = TypeVar("T")


def _changing(change: Callable[Concatenate[Connection, P], T]) -> Callable[Concatenate[Ledger, P], T]:
    """``ledger.cancel(job_id)`` is ``jobs.cancel(db, job_id)`` in a transaction."""

    def in_transaction(ledger: Ledger, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with writing(ledger.db) as db:
            return change(db, *args, **kwargs)

    return in_transaction


def _changing_by_terms(change: Callable[Concatenate[Connection, Terms, P], T]) -> Callable[Concatenate[Ledger, P], T]:
    """``ledger.renew(lease)`` is ``leases.renew(db, ledger.terms, lease)`` in a transaction."""

    def in_transaction(ledger: Ledger, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with writing(ledger.db) as db:
            return change(db, ledger.terms, *args, **kwargs)

    return in_transaction


def _asking(question: Callable[Concatenate[Connection, P], T]) -> Callable[Concatenate[Ledger, P], T]:
    """``ledger.progress(job_id)`` is ``status.progress(db, job_id)`` on one consistent state."""

    def on_one_state(ledger: Ledger, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with reading(ledger.db) as db:
            return question(db, *args, **kwargs)

    return on_one_state


class Ledger:
    """The ledger over one database. The functions that its methods name say what they do."""

    def __init__(
        self,
        db: Engine,
        *,
        lease_s: float = LEASE_S,
        max_attempts: int = MAX_ATTEMPTS,
        database_clock: DatabaseClock | None = None,
    ) -> None:
        """``database_clock``: what this process knows already of the database's clock."""
        self.db = db
        self.terms = Terms(lease_s, max_attempts, database_clock or DatabaseClock())
        self._expired = recovery.ExpiredLeases(db, self.terms)

    @property
    def lease_s(self) -> float:
        """Seconds a chunk stays a worker's unrenewed."""
        return self.terms.lease_s

    @property
    def database_clock(self) -> DatabaseClock:
        """Turns this machine's ``time.monotonic()`` into the database's time."""
        return self.terms.clock

    # --- leases ------------------------------------------------------------------------------------------------------

    def claim(self, chunk: ChunkId, worker_id: str) -> Lease | None:
        """:func:`leases.claim`. On PostgreSQL its one statement is its own transaction: one way to the server."""
        if self.db.dialect.name != "postgresql":
            with writing(self.db) as db:
                return leases.claim(db, self.terms, chunk, worker_id)
        with connecting(self.db), self.db.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            return leases.claim(db, self.terms, chunk, worker_id)

    claim_next = _changing_by_terms(leases.claim_next)
    claim_of_model = _changing_by_terms(leases.claim_of_model)
    adopt = _changing_by_terms(leases.adopt)
    renew = _changing_by_terms(leases.renew)
    answered_by = _changing(leases.answered_by)
    standing = _asking(status.standing)

    def is_suspect(self, lease: Lease) -> bool:
        """Whether this is the chunk's last attempt: it must run alone, so that its end is its own doing."""
        return lease.failures + 1 >= self.terms.max_attempts

    # --- results -----------------------------------------------------------------------------------------------------

    pending = _asking(results.pending)

    def record(
        self,
        lease: Lease,
        batch: Sequence[tuple[Result, int]],
        counters: EngineCounters | None = None,
        *,
        maybe_stored: bool = False,
    ) -> int:
        """:func:`results.record`. Nothing takes no transaction."""
        if not batch:
            return 0
        with writing(self.db) as db:
            return results.record(db, self.terms, lease, batch, counters, maybe_stored=maybe_stored)

    finish = _changing_by_terms(endings.finish)
    release = _changing(endings.release)
    fail = _changing_by_terms(endings.fail)

    # --- jobs --------------------------------------------------------------------------------------------------------

    cancel = _changing(jobs.cancel)
    stop = _changing(jobs.stop)
    pause = _changing(jobs.pause)
    resume = _changing(jobs.resume)
    retry = _changing(retries.retry)
    progress = _asking(status.progress)
    job_spec = _asking(status.job_spec)
    model_of = _asking(status.model_of)
    open_jobs = _asking(status.open_jobs)
    is_open = _asking(status.is_open)
    holders = _asking(status.holders)

    # --- messages and recovery ---------------------------------------------------------------------------------------

    take_window = _changing(publishing.take_window)
    mark_published = _changing(publishing.mark_published)
    unpublish_chunk = _changing(publishing.unpublish_chunk)
    unpublish = _changing(publishing.unpublish)
    abandon_leases = _changing(recovery.abandon_leases)

    def requeue_expired(self) -> list[ChunkId]:
        """:meth:`recovery.ExpiredLeases.requeue`."""
        return self._expired.requeue()

    def complete_jobs(self) -> None:
        """:func:`jobs.complete_jobs`: a transaction for each job."""
        jobs.complete_jobs(self.db)

    def expire_overdue(self) -> list[str]:
        """:func:`jobs.expire_overdue`: a transaction for each job."""
        return jobs.expire_overdue(self.db)
