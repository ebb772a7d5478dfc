"""Requests with a waiting client: sent to a worker through Redis, their tokens read from this server's own list."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from redis.exceptions import RedisError
from ulid import ULID

from promptmill.api.http.errors import ApiError
from promptmill.api.http.ids import new_id
from promptmill.api.interactive.pending_request import PendingRequest, failure
from promptmill.core.redis_client import redis_client
from promptmill.errors import first_line
from promptmill.queue.heartbeats import HEARTBEAT_S, Absences, HeartbeatMessage, heartbeat_key, heartbeat_of
from promptmill.queue.interactive_wire import (
    AGAIN,
    CANCEL,
    DONE,
    FAILED,
    LAST,
    MOST_TRIES,
    REPEAT,
    SERVER_GONE_S,
    TEXT,
    BadReply,
    LiveRequest,
    control_list,
    lane_list,
    live_queue,
    reply_list,
    reply_of,
    server_key,
)
from promptmill.types import ErrorClass

log = logging.getLogger("promptmill.api")

#: Seconds that a look into the list of replies waits, and replies taken at a time.
LOOK_S = 2
REPLIES_AT_ONCE = 500

#: Seconds between looks at whether the workers that hold requests are alive.
WATCH_S = 2.0

#: Seconds without a word on a request after which it is looked for, and requests that are looked for at a time.
QUIET_S = 5.0
MOST_LOOKED_FOR = 256

#: Seconds without a worker's sign of life after which its requests are sent again: Redis may have begun anew.
MISSED_S = 2 * HEARTBEAT_S

#: Seconds before Redis is tried again after it was away, and in which it answers or is away.
AWAY_S = 0.5
ANSWER_S = 10

#: Most abandoned requests that are remembered, should a worker run one all the same.
MOST_WITHDRAWN = 4096

NO_REDIS = "A service is not reachable; try again later."


class Live:
    """All requests of this server that are under way. One event loop owns it."""

    def __init__(self, redis_url: str, timeout_s: float) -> None:
        self._id = str(ULID()).lower()
        self._timeout_s = timeout_s
        self._redis: Any = redis_client(
            redis_url, asynchronous=True, socket_connect_timeout=ANSWER_S, socket_timeout=ANSWER_S
        )
        self._calls: dict[str, PendingRequest] = {}
        # Id -> model, of requests whose client is gone.
        self._withdrawn: dict[str, str] = {}
        # List -> what is pushed to its end, and to its head.
        self._outbox: dict[str, list[bytes]] = {}
        self._first: dict[str, list[bytes]] = {}
        self._unsent: list[PendingRequest] = []
        self._absences = Absences(MISSED_S)
        self._flushing: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    @property
    def waiting(self) -> int:
        """Requests under way."""
        return len(self._calls)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    def order(self, worker: str, what: str, model: str) -> None:
        """Tell a worker to load or unload a model."""
        self._push(control_list(worker), orjson.dumps([what, model]))

    async def beats(self, workers: list[str]) -> dict[str, HeartbeatMessage]:
        """The signs of life of those workers that have one; none while Redis is away."""
        with contextlib.suppress(RedisError, OSError):
            found = await self._redis.mget([heartbeat_key(each) for each in workers]) if workers else []
            beats = zip(workers, map(heartbeat_of, found), strict=True)
            return {worker: beat for worker, beat in beats if beat is not None}
        return {}

    async def close(self) -> None:
        # A cancellation that comes together with an answer of Redis is lost in its client.
        self._closing = True
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._redis.aclose()

    @contextlib.asynccontextmanager
    async def call(
        self, model: str, sampling: dict[str, Any], owner: str | None, **question: Any
    ) -> AsyncIterator[PendingRequest]:
        """Send a request of ``owner``'s key. Leaving before its end drops it: its slot is free within a step or two."""
        until = asyncio.get_running_loop().time() + self._timeout_s
        call = PendingRequest(LiveRequest(new_id(), self._id, model, sampling, owner=owner or "", **question), until)
        self._calls[call.request.id] = call
        self._unsent.append(call)
        try:
            self._push(live_queue(model), call.request.encode())
            yield call
        finally:
            del self._calls[call.request.id]
            if not call.ended:
                self._drop(call)

    def _drop(self, call: PendingRequest) -> None:
        self._remember_withdrawn(call.request)
        if call.worker is not None:
            self._cancel(call.request.id, call.worker, call.request.model)
        else:
            task = asyncio.ensure_future(self._withdraw(call.request))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _remember_withdrawn(self, request: LiveRequest) -> None:
        self._withdrawn[request.id] = request.model
        while len(self._withdrawn) > MOST_WITHDRAWN:
            del self._withdrawn[next(iter(self._withdrawn))]

    async def _withdraw(self, request: LiveRequest) -> None:
        """Out of the queue, if it is still there; a worker that took it meanwhile is told when it says so."""
        with contextlib.suppress(RedisError, OSError):
            await self._redis.lrem(live_queue(request.model), 1, request.encode())

    # --- to Redis ----------------------------------------------------------------------------------------------------

    def _push(self, name: str, data: bytes, *, first: bool = False) -> None:
        """Together with all that is pushed in this round of the event loop: one round trip."""
        (self._first if first else self._outbox).setdefault(name, []).append(data)
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.ensure_future(self._flush())

    def _cancel(self, request_id: str, worker: str, model: str) -> None:
        self._push(lane_list(worker, model), orjson.dumps([CANCEL, request_id]))

    async def _flush(self) -> None:
        while self._outbox or self._first:
            outbox, self._outbox = self._outbox, {}
            first, self._first = self._first, {}
            calls, self._unsent = self._unsent, []
            try:
                pipe = self._redis.pipeline(transaction=False)
                for name, data in outbox.items():
                    pipe.rpush(name, *data)
                for name, data in first.items():
                    pipe.lpush(name, *reversed(data))
                for name in outbox.keys() | first.keys():
                    pipe.expire(name, int(self._timeout_s) + 60)
                await pipe.execute()
                now = time.perf_counter()
                for call in calls:
                    call.queued_at = now
            except (RedisError, OSError) as problem:
                log.warning("Redis does not answer: %s", first_line(problem))
                for call in calls:
                    # It may be in the queue all the same.
                    self._remember_withdrawn(call.request)
                    call.put(FAILED, ApiError(503, NO_REDIS))

    # --- from Redis --------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        name = reply_list(self._id)
        while not self._closing:
            try:
                found = await self._redis.blpop([name], LOOK_S)
                if found is None:
                    continue
                self._take(found[1])
                for data in await self._redis.lpop(name, REPLIES_AT_ONCE) or ():
                    self._take(data)
            except (RedisError, OSError) as problem:
                log.warning("Redis does not answer: %s", first_line(problem))
                await asyncio.sleep(AWAY_S)

    def _take(self, data: bytes) -> None:
        """One reply. What cannot be read spoils nothing of those beside it."""
        try:
            self._hear(*reply_of(data))
        except BadReply as bad:
            log.warning("a reply of %d bytes is dropped: %s", len(data), bad)
            if bad.about is not None:
                self._mishear(*bad.about)
        except Exception as problem:
            log.warning("a reply of %d bytes is dropped: %s", len(data), type(problem).__name__)

    def _mishear(self, call_id: str, number: int) -> None:
        """Something else may have come in the place of a reply: it is asked for again, once."""
        call = self._calls.get(call_id)
        if call is None or call.ended or number < call.heard or call.worker is None:
            return
        if call.asked_at != call.heard:
            self._ask_again(call)
        else:
            self._begin_again(call, ErrorClass.WORKER_LOST.value, "what its worker says is not understood")

    def _hear(self, call_id: str, worker: str, number: int, kind: str, rest: list[Any]) -> None:
        self._absences.heard(worker)
        call = self._calls.get(call_id)
        if call is None:
            if kind not in LAST:
                self._cancel_withdrawn(call_id, worker)
            return
        if call.ended or number < call.heard:
            return
        call.worker = worker
        if number > call.heard:
            # Redis has lost what was said between.
            if call.asked_at != call.heard:
                self._ask_again(call)
            return
        call.heard, call.seen_at = number + 1, time.monotonic()
        if kind == AGAIN:
            self._begin_again(call, *rest)
        elif kind == TEXT:
            call.told = True
            call.put(TEXT, rest)
        elif kind == DONE:
            call.put(DONE, rest[0])
        elif kind == FAILED:
            call.put(FAILED, failure(call.request, *rest))

    def _cancel_withdrawn(self, call_id: str, worker: str) -> None:
        """A worker runs what no client waits for."""
        model = self._withdrawn.pop(call_id, None)
        if model is not None:
            self._cancel(call_id, worker, model)

    # --- what is lost ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Whatever a worker or Redis loses is noticed here: a client waits for its answer."""
        while not self._closing:
            try:
                # Workers drop the requests of a server that is gone.
                await self._redis.set(server_key(self._id), "1", ex=SERVER_GONE_S)
                await self._look_at_workers()
                await self._look_for_quiet()
            except (RedisError, OSError) as problem:
                log.warning("Redis does not answer: %s", first_line(problem))
            except Exception:
                log.exception("looking after requests failed, and goes on")
            await asyncio.sleep(WATCH_S)

    async def _look_at_workers(self) -> None:
        """Requests of a worker that is gone are sent again."""
        held = sorted({each.worker for each in self._calls.values() if each.worker is not None})
        alive = await self._redis.mget([heartbeat_key(each) for each in held]) if held else []
        gone = self._absences.look(dict(zip(held, (each is not None for each in alive), strict=True)))
        for call in [each for each in self._calls.values() if each.worker in gone and not each.ended]:
            self._begin_again(call, "worker_lost", "its worker is gone")

    def _begin_again(self, call: PendingRequest, error_class: str, message: str) -> None:
        """On another worker; it fails when its client has seen a part of the answer, or it was tried often."""
        if call.told or call.tries >= MOST_TRIES:
            call.put(FAILED, failure(call.request, error_class, message))
        else:
            call.tries += 1
            self._send_again(call)

    def _send_again(self, call: PendingRequest) -> None:
        """Before those that came later."""
        del self._calls[call.request.id]
        self._remember_withdrawn(call.request)
        call.begin_again()
        self._calls[call.request.id] = call
        self._push(live_queue(call.request.model), call.request.encode(), first=True)

    async def _look_for_quiet(self) -> None:
        """Ask the worker about a request that is taken; look for another one in its list."""
        old = time.monotonic() - QUIET_S
        quiet = [each for each in self._calls.values() if each.queued_at and not each.ended and each.seen_at < old]
        quiet = quiet[:MOST_LOOKED_FOR]
        for call in quiet:
            if call.worker is not None:
                call.seen_at = time.monotonic()
                self._ask_again(call)
        waiting = [(each, each.request) for each in quiet if each.worker is None]
        pipe = self._redis.pipeline(transaction=False)
        for _, request in waiting:
            pipe.lpos(live_queue(request.model), request.encode())
        for (call, request), place in zip(waiting, await pipe.execute() if waiting else (), strict=True):
            if call.request is not request or call.worker is not None or call.ended:
                continue
            if place is not None:
                call.missed, call.seen_at = False, time.monotonic()
            elif call.missed:
                log.warning("a request for %s was lost on its way and is sent again", request.model)
                # No worker may understand it: it is not sent for ever.
                self._begin_again(call, ErrorClass.WORKER_LOST.value, "it was lost on its way again and again")
            else:
                # A worker may just have taken it.
                call.missed = True

    def _ask_again(self, call: PendingRequest) -> None:
        """For what its worker has said, from the first reply that did not come."""
        assert call.worker is not None
        call.asked_at = call.heard
        asked = orjson.dumps([REPEAT, call.request.id, self._id, call.heard])
        self._push(lane_list(call.worker, call.request.model), asked)
