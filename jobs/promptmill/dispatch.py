"""Keeps a window of each job's chunks published, and finds those that lost their worker or their message."""

from __future__ import annotations

import json

import sqlalchemy as sa

from promptmill.broker import Broker
from promptmill.database import epoch, reading
from promptmill.ledger import Ledger
from promptmill.privacy import redact_overdue
from promptmill.tables import workers

#: Chunks of a job that are published and not done, for each worker that runs its model. A worker holds two; the other
#: two wait in Redis, so that it never waits for the database.
WINDOW_PER_WORKER = 4

#: Seconds without a heartbeat after which a worker counts as gone: six are missed.
ALIVE_S = 30.0

#: Seconds after which a chunk that waits is published again although the queue is empty: its message was lost.
LOST_MESSAGE_S = 5.0

#: The same while the queue holds messages, of which its own may be one.
STALE_MESSAGE_S = 600.0


#: Seconds without a chunk running after which a waiting job moves up by one priority, so that none waits for ever.
AGE_S = 120.0


def _aged(priority: int, waited_s: float) -> int:
    return max(0, priority - int(max(0.0, waited_s) // AGE_S))


class Dispatcher:
    """Moves chunk ids from the ledger to the broker. Any number of these may run at once."""

    def __init__(self, ledger: Ledger, broker: Broker) -> None:
        self._ledger = ledger
        self._broker = broker

    def dispatch(self, job_id: str, model: str, priority: int) -> int:
        """Publish the next chunks of the job; returns how many. Raises BrokerError when Redis is away."""
        chunks = self._ledger.take_window(job_id, WINDOW_PER_WORKER * max(1, self._alive(model)))
        self._broker.publish(chunks, model, priority)
        return len(chunks)

    def reconcile(self) -> int:
        """Requeue chunks without a live lease and publish what has no message; returns how many were published."""
        lost = self._ledger.requeue_expired()
        self._ledger.complete_jobs()
        self._ledger.expire_overdue()
        redact_overdue(self._ledger.db)
        published = 0
        for job in self._ledger.open_jobs("queue"):
            priority = _aged(job.priority, job.waited_s)
            patience = LOST_MESSAGE_S if self._broker.waiting(job.model) == 0 else STALE_MESSAGE_S
            # A job that has waited moves up: its messages are sent again, to a list that is read earlier.
            self._ledger.unpublish(job.id, patience if priority == job.priority else min(patience, AGE_S))
            # What a dead worker held has waited for a lease already: it goes before what is new.
            again = self._ledger.mark_published([chunk for chunk in lost if chunk.job_id == job.id])
            self._broker.publish(again, job.model, max(0, priority - 1))
            published += len(again) + self.dispatch(job.id, job.model, priority)
        return published

    def _alive(self, model: str) -> int:
        """Workers that serve the model, whichever they have loaded."""
        alive = sa.select(workers.c.models).where(
            workers.c.state != "stopped", workers.c.heartbeat_at > epoch() - ALIVE_S
        )
        with reading(self._ledger.db) as db:
            return sum(model in json.loads(models) for models in db.execute(alive).scalars())
