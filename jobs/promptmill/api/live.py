"""Requests that somebody waits for: sent to a worker through Redis, their tokens read from this server's own list."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
from redis.exceptions import RedisError
from ulid import ULID

from promptmill.addresses import redis_client
from promptmill.api.errors import ApiError
from promptmill.api.ids import new_id
from promptmill.live_wire import (
    AGAIN,
    DONE,
    FAILED,
    MOST_TRIES,
    SERVER_GONE_S,
    TAKEN,
    TEXT,
    LiveRequest,
    beat_key,
    cancel_list,
    control_list,
    live_queue,
    reply_list,
    server_key,
)
from promptmill.openai_parameters import refusal_of

log = logging.getLogger("promptmill.api")

#: Seconds that a look into the list of replies waits, and replies taken at a time.
LOOK_S = 2
REPLIES_AT_ONCE = 500

#: Seconds between looks at whether the workers that hold requests are alive.
WATCH_S = 2.0

#: Seconds before Redis is tried again after it was away, and in which it answers or is away.
AWAY_S = 0.5
ANSWER_S = 10

#: Most withdrawn requests that are remembered, until a worker says that it took one all the same.
MOST_WITHDRAWN = 4096

#: Our error classes -> the status and code of the answer. Others are 502: another try may go better.
STATUSES = {
    "context_overflow": (400, "context_length_exceeded"),
    "invalid_request": (400, "invalid_request"),
    "tokenize": (400, "invalid_request"),
    "grammar": (400, "invalid_grammar"),
    "model_not_found": (404, "model_not_found"),
    "model_load": (503, "model_not_loaded"),
    "timeout": (504, "timeout"),
    "stall": (504, "timeout"),
}

NO_REDIS = "A service is not reachable; try again later."


def failure(request: LiveRequest, error_class: str, message: str) -> ApiError:
    """What a client is told of a request that failed."""
    status, code = STATUSES.get(error_class, (502, error_class))
    param = _question(request) if code == "context_length_exceeded" else None
    if code == "invalid_request":
        param, code = refusal_of(message)
    # What broke inside is for the log of the worker.
    shown = message if status < 500 or status == 504 else "The model could not answer this request."
    return ApiError(status, shown, param=param, code=code)


def _question(request: LiveRequest) -> str:
    """The field that its body asked with."""
    if request.messages is not None:
        return "messages"
    return "input" if request.sampling.get("embedding") else "prompt"


class Call:
    """One request under way, and what is known of it."""

    def __init__(self, request: LiveRequest) -> None:
        self.request = request
        self.worker: str | None = None
        self.told = False
        self.ended = False
        #: When it was in the queue, by ``time.perf_counter()``.
        self.queued_at: float | None = None
        self._replies: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def put(self, kind: str, value: Any) -> None:
        self._replies.put_nowait((kind, value))

    async def replies(self) -> AsyncIterator[tuple[str, Any]]:
        """Text as it comes (``TEXT``: text, log-probabilities, number of the answer), then the answer (``DONE``).

        Raises ApiError for a request that fails.
        """
        try:
            async with asyncio.timeout(self.request.until - time.time()):
                while True:
                    kind, value = await self._replies.get()
                    if kind == FAILED:
                        self.ended = True
                        raise value
                    if kind == DONE:
                        self.ended = True
                    yield kind, value
                    if kind == DONE:
                        return
        except TimeoutError:
            raise ApiError(504, "No answer in time.", code="timeout") from None

    async def answer(self) -> dict[str, Any]:
        """The whole answer, as ``live_wire.answer_of`` made it."""
        try:
            async with asyncio.timeout(self.request.until - time.time()):
                kind, value = await self._replies.get()
                while kind == TEXT:
                    kind, value = await self._replies.get()
        except TimeoutError:
            raise ApiError(504, "No answer in time.", code="timeout") from None
        self.ended = True
        if kind == FAILED:
            raise value
        found: dict[str, Any] = value
        return found


class Live:
    """All requests of this server that are under way. One event loop owns it."""

    def __init__(self, redis_url: str, timeout_s: float) -> None:
        self._id = str(ULID()).lower()
        self._timeout_s = timeout_s
        self._redis: Any = redis_client(
            redis_url, asynchronous=True, socket_connect_timeout=ANSWER_S, socket_timeout=ANSWER_S
        )
        self._calls: dict[str, Call] = {}
        # Id -> model, of requests that nobody waits for and that no worker had taken yet.
        self._withdrawn: dict[str, str] = {}
        self._outbox: dict[str, list[bytes]] = {}
        self._unsent: list[Call] = []
        self._flushing: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """Requests under way."""
        return len(self._calls)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    def order(self, worker: str, what: str, model: str) -> None:
        """Tell a worker to load or unload a model."""
        self._push(control_list(worker), orjson.dumps([what, model]))

    async def beats(self, workers: list[str]) -> dict[str, dict[str, Any]]:
        """The signs of life of those workers that have one; none while Redis is away."""
        with contextlib.suppress(RedisError, OSError):
            found = await self._redis.mget([beat_key(each) for each in workers]) if workers else []
            return {worker: orjson.loads(data) for worker, data in zip(workers, found, strict=True) if data}
        return {}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._redis.aclose()

    @contextlib.asynccontextmanager
    async def call(self, model: str, sampling: dict[str, Any], **question: Any) -> AsyncIterator[Call]:
        """Send a request. Leaving before its end drops it: its slot is free within a step or two."""
        now = time.time()
        request = LiveRequest(new_id(), self._id, model, sampling, sent_at=now, until=now + self._timeout_s, **question)
        call = self._calls[request.id] = Call(request)
        self._unsent.append(call)
        try:
            self._push(live_queue(model), request.encode())
            yield call
        finally:
            del self._calls[request.id]
            if not call.ended:
                self._drop(call)

    def _drop(self, call: Call) -> None:
        if call.worker is not None:
            self._push(cancel_list(call.worker, call.request.model), call.request.id.encode())
        else:
            self._withdrawn[call.request.id] = call.request.model
            while len(self._withdrawn) > MOST_WITHDRAWN:
                del self._withdrawn[next(iter(self._withdrawn))]
            task = asyncio.ensure_future(self._withdraw(call.request))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _withdraw(self, request: LiveRequest) -> None:
        """Out of the queue, if it is still there; whoever took it meanwhile is told when it says so."""
        with contextlib.suppress(RedisError, OSError):
            await self._redis.lrem(live_queue(request.model), 1, request.encode())

    # --- to Redis ----------------------------------------------------------------------------------------------------

    def _push(self, name: str, data: bytes) -> None:
        """Together with all that is pushed in this round of the event loop: one round trip."""
        self._outbox.setdefault(name, []).append(data)
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.ensure_future(self._flush())

    async def _flush(self) -> None:
        while self._outbox:
            outbox, self._outbox = self._outbox, {}
            calls, self._unsent = self._unsent, []
            try:
                pipe = self._redis.pipeline(transaction=False)
                for name, data in outbox.items():
                    pipe.rpush(name, *data)
                    pipe.expire(name, int(self._timeout_s) + 60)
                await pipe.execute()
                now = time.perf_counter()
                for call in calls:
                    call.queued_at = now
            except (RedisError, OSError) as problem:
                log.warning("Redis does not answer: %s", str(problem).splitlines()[0] if str(problem) else problem)
                self._fail_sent(outbox)

    def _fail_sent(self, outbox: dict[str, list[bytes]]) -> None:
        sent = {each for data in outbox.values() for each in data}
        for call in list(self._calls.values()):
            if call.request.encode() in sent:
                call.put(FAILED, ApiError(503, NO_REDIS))

    # --- from Redis --------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        name = reply_list(self._id)
        while True:
            try:
                found = await self._redis.blpop([name], LOOK_S)
                if found is None:
                    continue
                self._take(found[1])
                for data in await self._redis.lpop(name, REPLIES_AT_ONCE) or ():
                    self._take(data)
            except (RedisError, OSError) as problem:
                log.warning("Redis does not answer: %s", str(problem).splitlines()[0] if str(problem) else problem)
                await asyncio.sleep(AWAY_S)
            except Exception:
                log.exception("a reply cannot be read")

    def _take(self, data: bytes) -> None:
        call_id, kind, *rest = orjson.loads(data)
        call = self._calls.get(call_id)
        if call is None:
            if kind == TAKEN:
                self._cancel_unknown(call_id, rest[0])
            return
        if kind == TAKEN:
            call.worker = rest[0]
        elif kind == AGAIN:
            call.worker = None
        elif kind == TEXT:
            call.told = True
            call.put(TEXT, rest)
        elif kind == DONE:
            call.put(DONE, rest[0])
        else:
            call.put(FAILED, failure(call.request, *rest))

    def _cancel_unknown(self, call_id: str, worker: str) -> None:
        """It was taken just before it was withdrawn."""
        model = self._withdrawn.pop(call_id, None)
        if model is not None:
            self._push(cancel_list(worker, model), call_id.encode())

    async def _watch(self) -> None:
        """Requests of a worker that is gone are sent again, or fail when somebody has seen a part of the answer."""
        while True:
            try:
                # Workers drop the requests of a server that is gone.
                await self._redis.set(server_key(self._id), "1", ex=SERVER_GONE_S)
                held = {each.worker for each in self._calls.values() if each.worker is not None}
                for worker in held:
                    if not await self._redis.exists(beat_key(worker)):
                        self._worker_gone(worker)
            except (RedisError, OSError) as problem:
                log.warning("Redis does not answer: %s", str(problem).splitlines()[0] if str(problem) else problem)
            await asyncio.sleep(WATCH_S)

    def _worker_gone(self, worker: str) -> None:
        for call in [each for each in self._calls.values() if each.worker == worker]:
            call.worker = None
            if call.told or call.request.tries >= MOST_TRIES:
                call.put(FAILED, failure(call.request, "worker_lost", "its worker is gone"))
            else:
                call.request = replace(call.request, tries=call.request.tries + 1)
                self._push(live_queue(call.request.model), call.request.encode())
