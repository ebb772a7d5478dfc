"""A worker's heartbeats: its row in the database, with what it got and uses, and its key in Redis.

Servers whose clients wait miss the key within seconds. Each of the two has a thread of its own: a database that hangs
must not silence the key, by which a worker then still counts as alive, and a Redis that hangs must not silence the row.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import psutil
import sqlalchemy as sa

from promptmill.core.redis_client import redis_client
from promptmill.database.engine import COMMITS, epoch, writing
from promptmill.database.tables import chunks, jobs, worker_samples, workers
from promptmill.errors import first_line
from promptmill.ledger import Ledger
from promptmill.queue.broker import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
from promptmill.queue.heartbeats import GONE_S, HEARTBEAT_S, HeartbeatMessage, heartbeat_key
from promptmill_workers.devices import Device, DeviceMetrics
from promptmill_workers.host.model_hosts import ModelHosts
from promptmill_workers.worker.database_retry import PASSING
from promptmill_workers.worker.shutdown import Shutdown

log = logging.getLogger("promptmill.worker")

#: Seconds between two writes of the row, each with a sample of resources.
ROW_S = 5.0


class Heartbeat:
    """Writes both, from threads that depend on no engine."""

    def __init__(
        self,
        ledger: Ledger,
        worker_id: str,
        device: Device,
        hosts: ModelHosts,
        stop: Shutdown,
        models: Sequence[str] = (),
        redis_url: str | None = None,
    ) -> None:
        """``redis_url``: None for a worker that no server looks for."""
        self._ledger = ledger
        self._db = ledger.db
        self._worker_id = worker_id
        self._device = device
        self._hosts = hosts
        self._stop = stop
        self._models = json.dumps(list(models))
        self._stopping = threading.Event()
        self._one_writer = threading.Lock()
        self._key = heartbeat_key(worker_id)
        self._away: tuple[type[Exception], ...] = PASSING
        self._redis: Any = None
        if redis_url is not None:
            from redis.exceptions import RedisError  # Takes 40 ms, which a run without Redis need not wait for.

            self._away += (RedisError,)
            self._redis = redis_client(
                redis_url, socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=ANSWER_TIMEOUT_S
            )
        self._in_redis = threading.Thread(target=self._repeat, args=(HEARTBEAT_S, self._write_key), daemon=True)
        self._gauge = DeviceMetrics(device)
        self._tokens: tuple[float, int] | None = None
        self._cpu: tuple[float, float] | None = None
        self._started_at: float | None = None

    def start(self) -> None:
        """Write the row down, and keep it and the key up to date from now on."""
        # Short jobs too have a sample: one at the start, one at the end.
        self._write()
        threading.Thread(target=self._repeat, args=(ROW_S, self._write), daemon=True).start()
        if self._redis:
            self._try(self._write_key)
            self._in_redis.start()

    def changed(self, hosts: ModelHosts) -> None:
        """The host was started, replaced or has loaded: write it down at once."""
        self._write(with_sample=False)

    def stop(self) -> None:
        """Say goodbye: the worker is gone on purpose. Without database and Redis its heartbeats just end."""
        self._stopping.set()
        if self._redis:
            self._in_redis.join(1)
            try:
                self._redis.delete(self._key)
            except self._away:
                log.warning("Redis is away: this worker is missed in %d s", GONE_S)
        try:
            self._write({"state": "stopped"})
        except PASSING as problem:
            log.warning("no last sample: %s", first_line(problem))

    def _row(self) -> dict[str, Any]:
        info = self._hosts.info
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "state": self.state(),
            "models": self._models,
            "device_asked": self._device.name,
            "device_got": info.device_got if info else None,
            "engine": info.engine if info else None,
            "model": info.model_name if info else None,
            "model_fingerprint": self._hosts.fingerprint_of(self._hosts.model) if info else None,
            "layers": info.layers if info else None,
            "layers_offloaded": info.layers_offloaded if info else None,
            "slots": info.slots if info else None,
            "kv_cells": info.kv_cells if info else None,
            "versions": json.dumps(self._versions()),
            "clock_offset_s": self._ledger.database_clock.ahead_s(),
            "model_load_s": self._hosts.load_s,
            "host_restarts": self._hosts.restarts,
        }

    def state(self) -> str:
        """What the worker does, as ``promptmill workers`` shows it."""
        if self._stop.is_blocked:
            return "blocked"
        if self._stop.draining.is_set():
            return "stopping"
        if self._hosts.is_backing_off:
            return "restarting"
        if self._hosts.state != "idle":
            return self._hosts.state
        return "busy" if sum(self._hosts.load()) else "idle"

    def _versions(self) -> dict[str, str]:
        info = self._hosts.info
        own = {
            "promptmill": version("promptmill"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        }
        return own | ({info.engine: info.version} if info else {})

    def _write(self, only: dict[str, Any] | None = None, *, with_sample: bool = True) -> None:
        """Write the row, or ``only`` some of it, and a sample.

        The row may be gone while the worker lives: the database was restored, or this machine was asleep for long.
        """
        with self._one_writer, writing(self._db) as db:
            now = self._ledger.database_clock.read(db)
            values = (only or self._row()) | {"heartbeat_at": now}
            if not db.execute(sa.update(workers).where(workers.c.id == self._worker_id).values(values)).rowcount:
                self._started_at = self._started_at or now
                whole = self._row() | values | {"id": self._worker_id, "started_at": self._started_at}
                db.execute(sa.insert(workers).values(whole))
            if with_sample:
                self._add_sample(db, now)

    def _write_key(self) -> None:
        active, waiting = self._hosts.load()
        message: HeartbeatMessage = {
            "state": self.state(), "active": active, "waiting": waiting, "slots": self._hosts.slots,
            "model": self._hosts.model, "commits": COMMITS.cumulative(),
        }  # fmt: skip
        self._redis.set(self._key, json.dumps(message), ex=GONE_S)

    def _repeat(self, wait_s: float, write: Callable[[], None]) -> None:
        """In a thread."""
        while not self._stopping.wait(wait_s):
            self._try(write)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except self._away as problem:
            log.warning("no heartbeat, trying again in a moment: %s", first_line(problem))
        except Exception:
            log.exception("the heartbeat of %s failed", self._worker_id)

    def _add_sample(self, db: sa.Connection, at: float) -> None:
        db.execute(sa.insert(worker_samples).values(self._sample(db, at)))

    def _sample(self, db: sa.Connection, at: float) -> dict[str, Any]:
        active, waiting = self._hosts.load()
        seconds, memory = self._process_use()
        now = time.monotonic()
        output_tps = self._rate("_tokens", now, self._output_tokens(db))
        return {
            "worker_id": self._worker_id,
            "at": at,
            "cpu_ratio": self._rate("_cpu", now, seconds),
            "memory_bytes": memory,
            "device_memory_bytes": self._gauge.memory_bytes(self._hosts.pid),
            "device_use_ratio": self._gauge.use_ratio(),
            "active_sequences": active,
            "waiting_requests": waiting,
            "slots": self._hosts.slots,
            "kv_cells_used": self._hosts.kv_cells_used(),
            # What was answered since the last sample was work, even where the slots are empty again.
            "state": self._phase(bool(active or waiting or output_tps)),
            "output_tps": output_tps,
        }

    def _phase(self, has_work: bool) -> str:
        """What resources are used for: 'loading', 'busy' or 'idle'."""
        if self._hosts.state == "loading" or self._hosts.info is None:
            return "loading"
        return "busy" if has_work else "idle"

    def _rate(self, name: str, now: float, value: float) -> float | None:
        """Change of ``value`` per second since the last sample; None for the first one."""
        before = getattr(self, name)
        setattr(self, name, (now, value))
        if before is None or now <= before[0]:
            return None
        return float(max(0.0, (value - before[1]) / (now - before[0])))

    def _output_tokens(self, db: sa.Connection) -> int:
        """Tokens of the answers in chunks that this worker holds or was the last to hold."""
        total = db.execute(
            sa.select(sa.func.sum(chunks.c.output_tokens)).where(
                chunks.c.worker_id == self._worker_id, chunks.c.job_id.in_(self._recent_jobs())
            )
        ).scalar()
        return int(total or 0)

    def _recent_jobs(self) -> sa.Select[tuple[str]]:
        return sa.select(jobs.c.id).where(sa.or_(jobs.c.finished_at.is_(None), jobs.c.finished_at > epoch() - 3600))

    def _process_use(self) -> tuple[float, int]:
        """CPU seconds used and bytes resident, of this process and its host."""
        seconds, memory = 0.0, 0
        for pid in (os.getpid(), self._hosts.pid):
            try:
                process = psutil.Process(pid)
                times = process.cpu_times()
                seconds += times.user + times.system
                memory += process.memory_info().rss
            except (psutil.Error, TypeError):
                continue
        return seconds, memory
