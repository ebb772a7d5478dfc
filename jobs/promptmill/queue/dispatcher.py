"""Keeps a window of each job's chunks published, and finds those that lost their worker or their message."""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from promptmill.database.engine import epoch, reading
from promptmill.database.tables import chunks, jobs, workers
from promptmill.ledger import Ledger
from promptmill.ledger.values import OPEN_STATES
from promptmill.queue.broker import Broker
from promptmill.queue.heartbeats import heartbeat_key, heartbeat_of
from promptmill.store import catalog
from promptmill.types import ChunkId, ChunkState

#: Chunks of a job that are published and not done, for each worker that runs its model. A worker holds two; the other
#: two wait in Redis, so that it never waits for the database.
WINDOW_PER_WORKER = 4

#: Seconds without a heartbeat after which a worker counts as gone: six are missed.
ALIVE_S = 30.0

#: Seconds without a heartbeat in the database after which a worker is not looked for in Redis either.
SILENT_S = 86_400.0

#: Seconds after which a chunk that waits, and has no message in the queue, is published again: its message was lost.
LOST_MESSAGE_S = 5.0

#: Seconds between two searches of a queue that is not empty for such chunks, in leases: it reads every message.
SEARCH_LEASES = 0.5

#: Seconds after which a chunk that waits is published again whatever the queue holds.
STALE_MESSAGE_S = 600.0

#: Seconds without a chunk running after which a waiting job moves up by one priority, so that none waits for ever.
AGE_S = 120.0


def waits_for(db: Engine, job: Row[Any]) -> str | None:
    """What an open job of the queue waits for in a sentence, when no live worker has its model; else None."""
    if job.mode != "queue" or job.state not in OPEN_STATES:
        return None
    alive = sa.select(workers.c.models).where(workers.c.state != "stopped", workers.c.heartbeat_at > epoch() - ALIVE_S)
    with reading(db) as connection:
        served = {name for models in connection.execute(alive).scalars() for name in json.loads(models)}
    if job.model in served:
        return catalog.waiting_for_models(db, ALIVE_S, job.id).get(job.id)
    others = f"live workers serve {', '.join(sorted(served))}" if served else "no worker is alive"
    return f"no live worker serves {job.model}: {others}. Start one: promptmill worker --model {shlex.quote(job.model)}"


def _aged(priority: int, waited_s: float) -> int:
    return max(0, priority - int(max(0.0, waited_s) // AGE_S))


def live_workers(db: Engine, redis_url: str) -> list[dict[str, Any]]:
    """Workers that are alive, as of :func:`promptmill.store.catalog.list_workers`.

    A database that takes no change has no news of them: what they say of themselves in Redis counts too.
    """
    known = catalog.list_workers(db, SILENT_S)
    beats = map(heartbeat_of, Broker(redis_url).look_up([heartbeat_key(each["id"]) for each in known]))
    return [
        {**each, "state": beat["state"] if beat else each["state"]}
        for each, beat in zip(known, beats, strict=True)
        if beat or each["age_s"] <= ALIVE_S
    ]


class Dispatcher:
    """Moves chunk ids from the ledger to the broker. Any number of these may run at once."""

    def __init__(self, ledger: Ledger, broker: Broker) -> None:
        self._ledger = ledger
        self._broker = broker
        #: Model -> when its queue was last searched.
        self._searched_at: dict[str, float] = {}

    def dispatch(self, job_id: str, model: str, priority: int, fingerprint: str | None = None) -> int:
        """Publish the next chunks of the job; returns how many. Raises BrokerError when Redis is away.

        None while all workers that serve the model are known to have another one under its name: they would only give
        them back.
        """
        serving = self._serving(model, workers.c.state != "stopped")
        able = sum(catalog.may_have(each, model, fingerprint) for each in serving)
        if serving and not able:
            return 0
        window = self._ledger.take_window(job_id, WINDOW_PER_WORKER * max(1, able))
        self._broker.publish(window, model, priority)
        return len(window)

    def reconcile(self) -> int:
        """Requeue chunks without a live lease and publish what has no message; returns how many were published."""
        lost = self._ledger.requeue_expired()
        self._ledger.complete_jobs()
        self._ledger.expire_overdue()
        published = 0
        open_jobs = self._ledger.open_jobs("queue")
        self._forget_lost_messages({job.model for job in open_jobs})
        for job in open_jobs:
            priority = _aged(job.priority, job.waited_s)
            # A job that has waited moves up: its messages are sent again, to a list that is read earlier.
            self._ledger.unpublish(job.id, STALE_MESSAGE_S if priority == job.priority else AGE_S)
            # What a dead worker held has waited for a lease already: it goes before what is new.
            again = self._ledger.mark_published([chunk for chunk in lost if chunk.job_id == job.id])
            self._broker.publish(again, job.model, max(0, priority - 1))
            published += len(again) + self.dispatch(job.id, job.model, priority, job.model_fingerprint)
        return published

    def is_served_elsewhere(self, model: str, worker_id: str) -> bool:
        """Whether another live worker that serves the model has a host that works."""
        return bool(self._serving(model, workers.c.state.in_(("idle", "busy")), workers.c.id != worker_id))

    def _forget_lost_messages(self, models: set[str]) -> None:
        """Let chunks that wait without a message be published again, however many messages of others there are.

        A message that a worker has just read is in no queue either: its chunk gets a second one, which finds the chunk
        leased.
        """
        for model in models:
            some_wait = self._broker.waiting([model]) != [0]
            if some_wait and not self._may_search(model):
                continue
            lost = self._published_and_waiting(model)
            if lost and some_wait:
                lost -= self._broker.waiting_chunks(model)
            for chunk in lost:
                self._ledger.unpublish_chunk(chunk)

    def _may_search(self, model: str) -> bool:
        now = time.monotonic()
        if now - self._searched_at.get(model, float("-inf")) < SEARCH_LEASES * self._ledger.lease_s:
            return False
        self._searched_at[model] = now
        return True

    def _published_and_waiting(self, model: str) -> set[ChunkId]:
        """Chunks that no worker runs, whose messages were sent longer ago than LOST_MESSAGE_S."""
        waiting = (
            sa.select(chunks.c.job_id, chunks.c.number)
            .join(jobs, jobs.c.id == chunks.c.job_id)
            .where(jobs.c.state.in_(OPEN_STATES), jobs.c.mode == "queue", jobs.c.model == model)
            .where(chunks.c.state == ChunkState.QUEUED.value, chunks.c.published_at < epoch() - LOST_MESSAGE_S)
        )
        with reading(self._ledger.db) as db:
            return {ChunkId(row.job_id, row.number) for row in db.execute(waiting)}

    def _serving(self, model: str, *such: sa.ColumnElement[bool]) -> list[sa.Row[Any]]:
        """Workers with a heartbeat that are such, and serve the model, whichever they have loaded."""
        with reading(self._ledger.db) as db:
            return catalog.serving(db, model, ALIVE_S, *such)
