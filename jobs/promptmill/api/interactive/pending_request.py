"""One request with a waiting client, and what its client is told when it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from promptmill.api.http.errors import ApiError
from promptmill.api.http.ids import new_id
from promptmill.queue.interactive_wire import DONE, FAILED, LAST, TEXT, LiveRequest
from promptmill.tasks.openai import refusal_of
from promptmill.types import ErrorClass

#: Our error classes -> the status and code of the answer. Others are 502: another try may go better.
STATUSES = {
    "context_overflow": (400, "context_length_exceeded"),
    "invalid_request": (400, "invalid_request"),
    "tokenize": (400, "invalid_request"),
    # The body's own grammar was tried before: what came to a dead end is the model's answer.
    "grammar": (500, "grammar"),
    "model_not_found": (404, "model_not_found"),
    "model_load": (503, "model_not_loaded"),
    "timeout": (504, "timeout"),
    "stall": (504, "timeout"),
}


def failure(request: LiveRequest, error_class: str, message: str) -> ApiError:
    """What a client is told of a request that failed."""
    status, code = STATUSES.get(error_class, (502, error_class))
    param = _question(request) if code == "context_length_exceeded" else None
    if code == "invalid_request":
        param, code = refusal_of(message)
    # What broke inside is for the log of the worker.
    is_told = status < 500 or status == 504 or error_class == ErrorClass.GRAMMAR
    shown = message if is_told else "The model could not answer this request."
    return ApiError(status, shown, param=param, code=code)


def _question(request: LiveRequest) -> str:
    """The field that its body asked with."""
    if request.messages is not None:
        return "messages"
    return "input" if request.sampling.get("embedding") else "prompt"


class PendingRequest:
    """One request under way, and what is known of it."""

    def __init__(self, request: LiveRequest, until: float) -> None:
        #: As it was sent last.
        self.request = request
        #: By the clock of the event loop.
        self.until = until
        self.tries = 1
        self.worker: str | None = None
        #: Its client was shown a part of its answer: it cannot begin again.
        self.told = False
        self.ended = False
        #: Replies that came, in their order, and after how many the worker was asked for the next one.
        self.heard = 0
        self.asked_at: int | None = None
        #: When there was news of it, or a look; whether that look did not find it. By ``time.monotonic()``.
        self.seen_at = time.monotonic()
        self.missed = False
        #: When it was in the queue, by ``time.perf_counter()``.
        self.queued_at: float | None = None
        self._replies: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def put(self, kind: str, value: Any) -> None:
        self.ended = self.ended or kind in LAST
        self._replies.put_nowait((kind, value))

    def begin_again(self) -> None:
        """Sent under another id, it is a request that no worker has taken."""
        self.request = replace(self.request, id=new_id())
        self.worker, self.heard, self.asked_at = None, 0, None
        self.seen_at, self.missed = time.monotonic(), False

    async def replies(self) -> AsyncIterator[tuple[str, Any]]:
        """Text as it comes (``TEXT``: text, log-probabilities, number of the answer), then the answer (``DONE``).

        Raises ApiError for a request that fails.
        """
        try:
            async with asyncio.timeout_at(self.until):
                while True:
                    kind, value = await self._replies.get()
                    if kind == FAILED:
                        raise value
                    yield kind, value
                    if kind == DONE:
                        return
        except TimeoutError:
            raise ApiError(504, "No answer in time.", code="timeout") from None

    async def answer(self) -> dict[str, Any]:
        """The whole answer, as ``live_wire.answer_of`` made it."""
        try:
            async with asyncio.timeout_at(self.until):
                kind, value = await self._replies.get()
                while kind == TEXT:
                    kind, value = await self._replies.get()
        except TimeoutError:
            raise ApiError(504, "No answer in time.", code="timeout") from None
        if kind == FAILED:
            raise value
        found: dict[str, Any] = value
        return found
