"""The leases of this worker: those whose reply was lost are adopted, and each is renewed while it is worked on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from promptmill.errors import first_line
from promptmill.ledger import Ledger, Standing
from promptmill.types import Lease
from promptmill_workers.host.client import Session
from promptmill_workers.worker.database_retry import PASSING, DatabaseRetry
from promptmill_workers.worker.shutdown import Shutdown

log = logging.getLogger("promptmill.worker")

#: Renewals in the time of a lease: five may fail before another worker takes the chunk.
RENEWALS = 6

#: Seconds between looks at whether the job was cancelled or the worker told to stop.
WATCH_S = 0.5


class HeldLeases:
    """Takes leases for the threads of a worker."""

    def __init__(self, ledger: Ledger, worker_id: str, patiently: DatabaseRetry) -> None:
        self._ledger = ledger
        self._worker_id = worker_id
        self._patiently = patiently
        self._lock = threading.Lock()
        self._known: list[Lease] = []

    @contextmanager
    def taken(self, claim: Callable[[], Lease | None]) -> Iterator[Lease | None]:
        """The lease that ``claim`` takes, and that is known as long as it is worked on."""
        lease = self._patiently(lambda again: self._claim(claim, again))
        try:
            yield lease
        finally:
            if lease is not None:
                with self._lock:
                    self._known = [each for each in self._known if each is not lease]

    def _claim(self, claim: Callable[[], Lease | None], again: bool) -> Lease | None:
        """``again``: an earlier try may have taken a lease without our learning it."""
        # Under the lock: what another thread has claimed and not noted yet would look like an unknown lease.
        with self._lock:
            lease = (self._ledger.adopt(self._worker_id, self._known) if again else None) or claim()
            if lease is not None:
                self._known.append(lease)
            return lease


@dataclass(slots=True)
class Watched:
    """What the watching thread watches; the session is set once the chunk has one."""

    session: Session | None = None
    #: A thread that still waits for a session is to have none.
    unwanted: threading.Event = field(default_factory=threading.Event)
    #: Nothing is left to be abandoned: a chunk that has just been closed has no lease any more.
    all_answered: bool = False


@contextmanager
def watching(ledger: Ledger, lease: Lease, stop: Shutdown) -> Iterator[Watched]:
    """Beside the work, in a thread: renew the lease, and tell the session when its work is no longer wanted."""
    ended, watched = threading.Event(), Watched()
    watcher = threading.Thread(target=_watch, args=(ledger, lease, watched, stop, ended), daemon=True)
    watcher.start()
    try:
        yield watched
    finally:
        ended.set()
        watcher.join()


def _watch(ledger: Ledger, lease: Lease, watched: Watched, stop: Shutdown, ended: threading.Event) -> None:
    renewed_at, drained, warned = time.monotonic(), False, False
    while not ended.wait(WATCH_S):
        try:
            looked_at = time.monotonic()
            # By the clock: each look at a slow database takes time too.
            if looked_at - renewed_at >= ledger.lease_s / RENEWALS:
                standing, renewed_at = ledger.renew(lease), looked_at
            else:
                standing = ledger.standing(lease)
            warned = False
            session = watched.session
            if session is None:
                # It waits for a host to be loaded, or for its turn.
                if stop.draining.is_set() or standing is not Standing.HELD:
                    watched.unwanted.set()
                continue
            if stop.abandoning.is_set() or standing in (Standing.LOST, Standing.UNWANTED):
                if standing is Standing.LOST and not watched.all_answered:
                    log.warning("chunk %s/%d: the lease is lost", lease.chunk.job_id, lease.chunk.number)
                session.abandon()
                return
            if (stop.draining.is_set() or standing is Standing.PAUSED) and not drained:
                session.drain()
                drained = True
        except OSError:
            return  # The host is gone; the thread that reads from it knows and reacts.
        except PASSING as problem:
            # The database may come back before the lease ends; if not, another worker takes the chunk.
            if not warned:
                log.warning(
                    "chunk %s/%d: the lease is not renewed: %s",
                    lease.chunk.job_id, lease.chunk.number, first_line(problem),
                )  # fmt: skip
            warned = True
        except Exception as problem:
            # Whatever it is, a lease that is not renewed any more would be worse.
            log.error("chunk %s/%d: a look at its lease failed: %s: %s", lease.chunk.job_id, lease.chunk.number,
                      type(problem).__name__, first_line(problem))  # fmt: skip
