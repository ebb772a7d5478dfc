"""Limits per key: calls a second as a bucket of tokens, and answers at one time. 429 says when to come back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from promptmill.api.http.errors import ApiError, bad
from promptmill.api.keys import Principal
from promptmill.core.settings import Settings

#: Seconds of its rate that a key may use at once.
BURST_S = 2.0

#: Calls a second that a key may make of pages at least: an open page makes about one by itself.
PAGE_CALLS_PER_S = 4.0

#: Buckets remembered; beyond it the fullest, which limit no key, are forgotten.
MOST_BUCKETS = 10_000


@dataclass(slots=True)
class Bucket:
    """Tokens at a time; it fills by the key's rate."""

    tokens: float
    at: float


class KeyLimits:
    """What each key has used. One event loop owns it."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self._running: dict[str, int] = {}

    def of(self, principal: Principal, name: str) -> float | None:
        """A limit of the key, or the settings' own. A person at this machine has none but for answers at a time."""
        if principal.key_id is None:
            return self._settings.api_concurrent if name == "concurrent" else None
        limit: float | None = principal.limits.get(name, getattr(self._settings, f"api_{name}"))
        return limit

    def count(self, principal: Principal, *, looks: bool = False) -> None:
        """One call more. Raises a 429 beyond the key's rate.

        ``looks``: a page that is looked at asks again and again by itself. It counts apart, at no less than its rate.
        """
        rate = self.of(principal, "requests_per_s")
        if rate is None or principal.key_id is None:
            return
        name = principal.key_id
        if looks:
            rate, name = max(rate, PAGE_CALLS_PER_S), f"{name} looks"
        now, most = self._clock(), max(1.0, rate * BURST_S)
        bucket = self._buckets.get(name)
        if bucket is None:
            if len(self._buckets) >= MOST_BUCKETS:
                self._buckets.clear()
            bucket = self._buckets[name] = Bucket(most, now)
        bucket.tokens = min(most, bucket.tokens + (now - bucket.at) * rate)
        bucket.at = now
        if bucket.tokens < 1:
            raise too_many(f"Rate limit reached: {rate:g} calls a second.", (1 - bucket.tokens) / rate)
        bucket.tokens -= 1

    @contextmanager
    def running(self, principal: Principal, count: int = 1) -> Iterator[None]:
        """Around ``count`` answers that a client waits for. Raises a 429 when the key waits for too many, and a 400 for
        more than it may ever wait for.
        """
        name = principal.key_id or ""
        most = self.of(principal, "concurrent")
        if most is not None and count > most:
            raise bad(f"Too many prompts in one call: {most:g} answers at one time are allowed.", "prompt")
        if most is not None and self._running.get(name, 0) + count > most:
            raise too_many(f"Too many answers at one time: {most:g} are allowed.", 1)
        self._running[name] = self._running.get(name, 0) + count
        try:
            yield
        finally:
            self._running[name] -= count
            if not self._running[name]:
                del self._running[name]


def too_many(message: str, seconds: float) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(max(1, math.ceil(seconds)))})
