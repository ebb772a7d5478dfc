"""Heartbeats of workers in Redis: who waits for an answer learns within seconds that its worker is gone."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from promptmill.queue.broker import KEY_PREFIX

#: Seconds between a worker's heartbeats in Redis, and after which it counts as gone without one.
HEARTBEAT_S = 3.0
GONE_S = 15


def heartbeat_key(worker_id: str) -> str:
    """The key in Redis of a worker's heartbeat, which expires after GONE_S."""
    return f"{KEY_PREFIX}live.worker.{worker_id}"


class HeartbeatMessage(TypedDict):
    """A worker's heartbeat in Redis. ``commits``: as ``database.CommitTimes.cumulative`` has them."""

    state: str
    active: int
    waiting: int
    slots: int
    model: str
    commits: list[float]


_HEARTBEAT = TypeAdapter(HeartbeatMessage)


def heartbeat_of(data: bytes | None) -> HeartbeatMessage | None:
    """A heartbeat as it was found; None where there is none, or something else."""
    try:
        return _HEARTBEAT.validate_json(data) if data else None
    except ValidationError:
        return None


class Absences:
    """Who has given no sign of life in Redis for how long. Redis may be emptied, again and again: once is not gone."""

    def __init__(self, gone_s: float) -> None:
        """``gone_s``: seconds of absence after which one is gone; longer than it takes from one look to the next."""
        self._gone_s = gone_s
        #: Name -> the first and the last look that missed it, by ``time.monotonic()``.
        self._missed: dict[str, tuple[float, float]] = {}

    def heard(self, name: str) -> None:
        """It said something: it is there, whatever Redis has lost."""
        self._missed.pop(name, None)

    def look(self, found: Mapping[str, bool]) -> set[str]:
        """Those who are gone. ``found``: whether Redis has a sign of life of each who is looked for."""
        now = time.monotonic()
        # Before a gap without looks, an absence ended.
        missed = {name: times for name, times in self._missed.items() if now - times[1] <= self._gone_s}
        self._missed = {name: times for name, times in missed.items() if not found.get(name)}
        for name in [name for name, is_found in found.items() if not is_found]:
            self._missed[name] = self._missed.get(name, (now, now))[0], now
        return {name for name in found if name in self._missed and now - self._missed[name][0] >= self._gone_s}
