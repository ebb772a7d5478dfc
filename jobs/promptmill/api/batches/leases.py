"""Whose turn it is: a batch with something to do belongs to one server for as long as that one renews its claim."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from ulid import ULID

from promptmill.api.batches.records import OPEN
from promptmill.core.backoff import Backoff
from promptmill.database.engine import epoch, reading, writing
from promptmill.database.tables import batches, jobs
from promptmill.types import JobState

#: Seconds that a batch stays with the server that looks after it, unrenewed, and between two renewals: four may be
#: missed. So long does a batch wait, and who cancels it, for a server that died.
CLAIM_S = 15.0
RENEW_S = 3.0

#: Batches worked on at one time, and those of one key among them.
AT_ONCE, AT_ONCE_OF_A_KEY = 4, 2

#: Before a batch that could not be worked on is tried again.
WAIT = Backoff(1.0, 15.0)


class BatchLeases:
    """The batches of one server's keeper. Any thread may renew and give back."""

    def __init__(self, db: Engine) -> None:
        self._db = db
        self._id = str(ULID())
        self._lock = threading.Lock()
        #: Batch -> its API key.
        self._busy: dict[str, str | None] = {}
        #: API key -> when a batch of it was last taken.
        self._turns: dict[str | None, float] = {}
        #: Batch -> tries in a row that went wrong.
        self._failures: Counter[str] = Counter()

    def due(self) -> list[str]:
        """Batches with something to do, that are free or ours; they are ours then. Keys take turns."""
        ended = sa.exists().where(
            jobs.c.id == batches.c.job_id, jobs.c.state.in_([each.value for each in JobState if each.is_final])
        )
        waits = sa.or_(batches.c.state != "in_progress", ended, batches.c.job_id.is_(None))
        with self._lock:
            busy = list(self._busy)
        if len(busy) >= AT_ONCE:
            return []
        place = sa.func.row_number().over(partition_by=batches.c.api_key_id, order_by=batches.c.id).label("place")
        waiting = (
            sa.select(batches.c.id, batches.c.api_key_id, place)
            .where(batches.c.state.in_(OPEN), waits, self._is_free(), batches.c.id.not_in(busy))
            .subquery()
        )
        with reading(self._db) as connection:
            found = connection.execute(sa.select(waiting).where(waiting.c.place <= AT_ONCE_OF_A_KEY)).all()
        never = float("-inf")
        found = sorted(found, key=lambda row: (row.place, self._turns.get(row.api_key_id, never), row.id))
        return [row.id for row in found if self._claim(row.id, row.api_key_id)]

    def _is_free(self) -> sa.ColumnElement[bool]:
        return sa.or_(
            batches.c.claimed_until.is_(None), batches.c.claimed_until < epoch(), batches.c.claimed_by == self._id
        )

    def _claim(self, batch_id: str, key_id: str | None) -> bool:
        with self._lock:
            of_key = list(self._busy.values()).count(key_id)
            if len(self._busy) >= AT_ONCE or of_key >= AT_ONCE_OF_A_KEY or batch_id in self._busy:
                return False
            self._busy[batch_id] = key_id
        try:
            is_ours = self._renew(batch_id)
        except BaseException:
            self._release(batch_id)
            raise
        if is_ours:
            self._turns[key_id] = time.monotonic()
        else:
            self._release(batch_id)
        return is_ours

    def _release(self, batch_id: str) -> None:
        with self._lock:
            self._busy.pop(batch_id, None)

    def _renew(self, batch_id: str) -> bool:
        with writing(self._db) as connection:
            changed = connection.execute(
                sa.update(batches)
                .where(batches.c.id == batch_id, self._is_free())
                .values(claimed_by=self._id, claimed_until=epoch() + CLAIM_S)
            )
        return changed.rowcount == 1

    @contextlib.contextmanager
    def renewing(self, batch_id: str) -> Iterator[None]:
        """Around the work on a batch that is ours."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(RENEW_S):
                with contextlib.suppress(Exception):
                    self._renew(batch_id)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def done(self, batch_id: str) -> None:
        """The work on it went well: for now there is nothing more to do."""
        self._failures.pop(batch_id, None)
        self._release(batch_id)

    def put_off(self, batch_id: str) -> float:
        """The batch is not tried again for so many seconds, which are returned: longer each time."""
        self._failures[batch_id] += 1
        wait_s = WAIT.delay_s(self._failures[batch_id])
        try:
            with writing(self._db) as connection:
                connection.execute(
                    sa.update(batches)
                    .where(batches.c.id == batch_id, batches.c.claimed_by == self._id)
                    .values(claimed_by=None, claimed_until=epoch() + wait_s)
                )
        finally:
            self._release(batch_id)
        return wait_s
