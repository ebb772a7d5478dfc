"""Server-sent events, and noticing that a client is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from promptmill.api.http.errors import ApiError
from promptmill.errors import PromptmillError

#: Seconds without an event after which a comment is sent, so that no proxy before the client hangs up.
PING_S = 15.0

#: Seconds between two looks at whether a stream would still be allowed.
REFUSED_S = 2.0

#: Why a stream would be refused now; None while it is allowed.
Refusal = Callable[[], Awaitable[ApiError | None]]


class ClientGone(Exception):
    """The client is gone."""


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of ``work``, which is cancelled when the client goes away. Raises :class:`ClientGone`."""
    here, gone = asyncio.current_task(), False
    assert here is not None

    async def watch() -> None:
        nonlocal gone
        await _disconnected(request.receive)
        gone = True
        here.cancel()

    # One task beside this one, not two: each call has its own.
    watching = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not gone:
            raise
        here.uncancel()
        raise ClientGone from None
    finally:
        watching.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Any, name: str | None = None, number: int | str | None = None) -> bytes:
    """One event; ``data`` becomes JSON."""
    head = (f"event: {name}\n" if name else "") + (f"id: {number}\n" if number is not None else "")
    return head.encode() + b"data: " + orjson.dumps(data) + b"\n\n"


async def _refused(refusal: Refusal) -> ApiError:
    while True:
        await asyncio.sleep(REFUSED_S)
        # This is not known while the database is away.
        with contextlib.suppress(PromptmillError, SQLAlchemyError):
            if (problem := await refusal()) is not None:
                return problem


class EventStream(Response):
    """Sends events as they come. When the client goes away, ``events`` is closed at once: its slot is free.

    So it is when ``refusal``, which is asked every few seconds, has one: it is the last event then.
    """

    def __init__(self, events: AsyncIterator[bytes], refusal: Refusal | None = None) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        # Not known beforehand.
        self.raw_headers = [each for each in self.raw_headers if each[0] != b"content-length"]
        self._events = events
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_disconnected(receive))
        tasks: set[asyncio.Future[Any]] = {sending, gone}
        refused = None if self._refusal is None else asyncio.ensure_future(_refused(self._refusal))
        if refused is not None:
            tasks.add(refused)
        done: set[asyncio.Future[Any]] = set()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task
        if refused is not None and done == {refused}:
            last = event(refused.result().body())
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:  # type: ignore[type-var]
            waiting: asyncio.Future[bytes] | None = None
            try:
                while True:
                    waiting = waiting or asyncio.ensure_future(anext(events))
                    done, _ = await asyncio.wait({waiting}, timeout=PING_S)
                    if not done:
                        await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
                        continue
                    data, waiting = waiting.result(), None
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except StopAsyncIteration:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                if waiting is not None and not waiting.done():
                    waiting.cancel()
                    with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                        await waiting
