"""The leases of one worker: it has none that none of its threads knows of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from promptmill.ledger import Ledger
from promptmill.types import Lease
from promptmill_workers.worker.database_retry import DatabaseRetry


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
        # Under the lock: what another thread has claimed and not noted yet would look like a lease nobody knows of.
        with self._lock:
            lease = (self._ledger.adopt(self._worker_id, self._known) if again else None) or claim()
            if lease is not None:
                self._known.append(lease)
            return lease
