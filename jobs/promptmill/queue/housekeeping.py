"""What grows with time and goes in small steps: old samples, workers that ended long ago, texts to be forgotten.

Workers, the API's keeper and ``promptmill reconcile`` do so, any number of them at once; none holds a lock for long.
"""

from __future__ import annotations

import logging

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.database import counting
from promptmill.database.engine import epoch, reading, writing
from promptmill.database.tables import attempts, counters, worker_samples, workers
from promptmill.scoring.forgetting import forget_overdue

log = logging.getLogger("promptmill.queue.housekeeping")

#: Seconds between two rounds of one process, and between two steps of a round: others want to write too.
ROUND_S = 60.0
STEP_S = 0.2

#: Rows removed in one transaction: a few milliseconds' work.
STEP_ROWS = 1000

#: Workers looked at in one step.
STEP_WORKERS = 200

#: Seconds without a sign of life after which a worker's counters lose its name.
RETIRED_S = 86_400.0

#: Seconds in a day.
DAY_S = 86_400.0


class Housekeeping:
    """One process's part. ``scoring``: whether texts that are to go may be scored here."""

    def __init__(self, db: Engine, samples_days: float, *, scoring: bool) -> None:
        self._db = db
        self._keep_s = samples_days * DAY_S
        self._scoring = scoring
        #: The worker that was looked at last, in the order of their ids.
        self._seen = ""

    def step(self) -> bool:
        """Do a little; False when a round is done."""
        forget_overdue(self._db, scoring=self._scoring)
        self._retire_counters()
        return self._remove_samples() == STEP_ROWS or self._remove_workers()

    def _remove_samples(self) -> int:
        each = worker_samples.c
        old = (
            sa.select(each.worker_id, each.at)
            .where(each.at < epoch() - self._keep_s)
            .order_by(each.at)
            .limit(STEP_ROWS)
            .with_for_update(skip_locked=True)
        )
        with writing(self._db) as db:
            return db.execute(sa.delete(worker_samples).where(sa.tuple_(each.worker_id, each.at).in_(old))).rowcount

    def _remove_workers(self) -> bool:
        """Remove some workers that are gone and have no attempt: reports name the others. False after the last."""
        page = sa.select(workers.c.id).where(workers.c.id > self._seen).order_by(workers.c.id).limit(STEP_WORKERS)
        with reading(self._db) as db:
            ids = db.execute(page).scalars().all()
        self._seen = ids[-1] if len(ids) == STEP_WORKERS else ""
        if ids:
            has_worked = sa.exists().where(attempts.c.worker_id == workers.c.id)
            is_gone = workers.c.heartbeat_at < epoch() - self._keep_s
            with writing(self._db) as db:
                db.execute(sa.delete(workers).where(workers.c.id.in_(ids), is_gone, ~has_worked))
        return bool(self._seen)

    def _retire_counters(self) -> None:
        is_there = sa.exists().where(
            workers.c.id == counters.c.worker_id, workers.c.heartbeat_at >= epoch() - RETIRED_S
        )
        gone = sa.select(counters.c.worker_id).where(counters.c.worker_id != counting.NO_WORKER, ~is_there).distinct()
        with reading(self._db) as db:
            ids = db.execute(gone.order_by(counters.c.worker_id).limit(STEP_WORKERS)).scalars().all()
        for worker_id in ids:
            with writing(self._db) as db:
                counting.retire(db, worker_id)
