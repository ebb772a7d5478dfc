"""A worker's sign of life in Redis, for servers whose clients wait: it is missed within seconds."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

from redis.exceptions import RedisError

from promptmill.core.redis_client import redis_client
from promptmill.database.engine import COMMITS
from promptmill.errors import first_line
from promptmill.queue.broker import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
from promptmill.queue.heartbeats import GONE_S, HEARTBEAT_S, HeartbeatMessage, heartbeat_key
from promptmill_workers.host.model_hosts import ModelHosts

log = logging.getLogger("promptmill.worker")


class RedisHeartbeat:
    """Writes it from a thread of its own; it ends by itself when the worker does."""

    def __init__(self, worker_id: str, redis_url: str, hosts: ModelHosts, state: Callable[[], str]) -> None:
        self._key = heartbeat_key(worker_id)
        self._hosts = hosts
        self._worker_state = state
        self._redis: Any = redis_client(
            redis_url, socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=ANSWER_TIMEOUT_S
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The worker is gone on purpose."""
        self._ended.set()
        self._thread.join(1)
        try:
            self._redis.delete(self._key)
        except RedisError:
            log.warning("Redis is away: this worker is missed in %d s", GONE_S)

    def _run(self) -> None:
        while True:
            try:
                self._redis.set(self._key, json.dumps(self._state()), ex=GONE_S)
            except RedisError as problem:
                log.warning("no sign of life: %s", first_line(problem))
            if self._ended.wait(HEARTBEAT_S):
                return

    def _state(self) -> HeartbeatMessage:
        active, waiting = self._hosts.load()
        return {
            "state": self._worker_state(), "active": active, "waiting": waiting, "slots": self._hosts.slots,
            "model": self._hosts.model, "commits": COMMITS.cumulative(),
        }  # fmt: skip
