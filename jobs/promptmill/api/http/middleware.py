"""Around every call: a request id, limits on what a client sends and how slowly, an access log without contents."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptmill.api.http.errors import ApiError, response
from promptmill.api.http.ids import new_id

log = logging.getLogger("promptmill.api.access")

#: Seconds that a client may send nothing of a body it has announced, and bytes per second that it must send on average
#: after as many seconds again: a client that drips is sent away.
BODY_PAUSE_S = 20.0
SLOWEST_BYTES_PER_S = 1024

#: Upper bounds in seconds of the histogram of times.
BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

#: The same of this server's own time on an answer.
OVERHEAD_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)

#: On every answer: nothing of ours runs in another site's frame, and nothing of others in our pages.
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
)

#: Names of this machine itself, by which a server without keys may be called.
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}


class Timings:
    """Counts and times of calls, by route and status: what /metrics shows of this server."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, int]] = Counter()
        self.buckets: Counter[tuple[str, float]] = Counter()
        self.sums: Counter[str] = Counter()
        #: Answers by this server's own time, by the first bound that it is within.
        self.overhead = [0] * (len(OVERHEAD_BOUNDS_S) + 1)
        self.overhead_s = 0.0

    def add_overhead(self, seconds: float) -> None:
        self.overhead[bisect_left(OVERHEAD_BOUNDS_S, seconds)] += 1
        self.overhead_s += seconds

    def add(self, method: str, route: str, status: int, seconds: float) -> None:
        self.counts[method, route, status] += 1
        self.sums[route] += seconds  # type: ignore[assignment]
        for bound in BOUNDS_S:
            if seconds <= bound:
                self.buckets[route, bound] += 1


class Gate:
    """The outermost part of the application. Plain ASGI: it costs microseconds."""

    def __init__(self, app: ASGIApp, *, timings: Timings, largest_body: int, largest_upload: int, locked: bool) -> None:
        self._app = app
        self._timings = timings
        self._largest_body = largest_body
        # The form around a file takes a little more.
        self._largest_upload = largest_upload + 65_536
        self._locked = locked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started, status = f"req_{new_id()}", time.perf_counter(), 0
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()), (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", str(int(1000 * (time.perf_counter() - started))).encode()),
                    *_absent(SECURITY_HEADERS, message.get("headers", ())),
                ]  # fmt: skip
                if "answered" in state:
                    message["headers"].append(self._overhead(started, state["answered"]))
            await send(message)

        problem = self._refused(scope)
        try:
            if problem is not None:
                await response(problem)(scope, receive, sending)
            else:
                await self._app(scope, self._limited(scope, receive), sending)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "none")
            self._timings.add(scope["method"], route, status, seconds)
            if log.isEnabledFor(logging.INFO):
                # The path of the route: an id in it is no content, a query may be.
                log.info("%s %s %d %.1f ms %s", scope["method"], route, status, 1000 * seconds, request_id)

    def _overhead(self, started: float, answered: tuple[float, float]) -> tuple[bytes, bytes]:
        """The header with this server's own time: to the queue, and from the worker's last token.

        ``answered``: when the request was queued and when its answer was ready, by ``time.perf_counter()``.
        """
        queued_at, finished_at = answered
        before, after = queued_at - started, max(0.0, time.perf_counter() - finished_at)
        self._timings.add_overhead(before + after)
        return b"server-timing", f"before;dur={1000 * before:.2f}, after;dur={1000 * after:.2f}".encode()

    def _refused(self, scope: Scope) -> ApiError | None:
        """What is wrong with the head of the request."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if sum(name == b"host" for name, _ in scope["headers"]) > 1:
            return ApiError(400, "The request names two hosts.", code="invalid_host")
        if not self._locked and _name(host) not in LOCAL_NAMES:
            # Another site's name that was pointed at this machine (DNS rebinding) must not reach a server without keys.
            return ApiError(403, "This server answers to the names of this machine only.", code="wrong_host")
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            # PostgreSQL has no such character, and no object of ours has it in its id.
            return ApiError(400, "The URL holds a NUL character.", code="invalid_url")
        origin = headers.get(b"origin")
        if origin is not None and _place(origin) != host:
            return ApiError(403, "Pages of other sites may not call this server.", code="cross_origin")
        if headers.get(b"sec-fetch-site") == "cross-site" and scope["method"] not in ("GET", "HEAD"):
            return ApiError(403, "Pages of other sites may not call this server.", code="cross_origin")
        if headers.get(b"content-encoding", "identity").lower() != "identity":
            return ApiError(415, "Compressed bodies are not taken.", code="unsupported_content_encoding")
        length = headers.get(b"content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._most(scope):
            return self._too_large(scope)
        return None

    def _most(self, scope: Scope) -> int:
        is_upload = scope["path"] in ("/v1/files", "/jobs") and scope["method"] == "POST"
        return self._largest_upload if is_upload else self._largest_body

    def _too_large(self, scope: Scope) -> ApiError:
        return ApiError(413, f"The body is larger than {self._most(scope):,} bytes.", code="request_too_large")

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` that counts bytes and seconds until the body has come."""
        received, started, ended = 0, time.monotonic(), False

        async def limited() -> Message:
            nonlocal received, ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout(BODY_PAUSE_S):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "The body of the request came too slowly.", code="request_timeout") from None
            received += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if received > self._most(scope):
                raise self._too_large(scope)
            waited = time.monotonic() - started
            if waited > BODY_PAUSE_S and not ended and received < waited * SLOWEST_BYTES_PER_S:
                raise ApiError(408, "The body of the request came too slowly.", code="request_timeout")
            return message

        return limited


def _name(host: str) -> str:
    """``[::1]:8000`` and ``localhost:8000`` without their ports; what is no port stays."""
    return re.sub(r":[0-9]*\Z", "", host).lower()


def _place(origin: str) -> str | None:
    """Host and port of an origin; None for what is no URL."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _absent(wanted: Iterable[tuple[bytes, bytes]], there: Any) -> list[tuple[bytes, bytes]]:
    names = {name.lower() for name, _ in there}
    return [each for each in wanted if each[0] not in names]


Middleware = Callable[[Scope, Receive, Send], Awaitable[None]]
