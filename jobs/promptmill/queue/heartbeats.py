"""Heartbeats of workers in Redis: who waits for an answer learns within seconds that its worker is gone."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from promptmill.queue.broker import KEY_PREFIX

#: Seconds between a worker's heartbeats in Redis, and after which it counts as gone without one.
HEARTBEAT_S = 3.0
GONE_S = 15


def heartbeat_key(worker_id: str) -> str:
    """The key in Redis of a worker's heartbeat, which expires after GONE_S."""
    return f"{KEY_PREFIX}live.worker.{worker_id}"


class Heartbeat(TypedDict):
    """A worker's heartbeat in Redis. ``commits``: as ``database.CommitTimes.cumulative`` has them."""

    state: str
    active: int
    waiting: int
    slots: int
    model: str
    commits: list[float]


_HEARTBEAT = TypeAdapter(Heartbeat)


def heartbeat_of(data: bytes | None) -> Heartbeat | None:
    """A heartbeat as it was found; None where there is none, or something else."""
    try:
        return _HEARTBEAT.validate_json(data) if data else None
    except ValidationError:
        return None
