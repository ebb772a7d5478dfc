"""What an operator tells a worker through Redis: load a model that it serves, or unload one."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection
from typing import Any

from redis.exceptions import RedisError

from promptmill.core.redis_client import redis_client
from promptmill.errors import PromptmillError
from promptmill.queue.broker import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
from promptmill.queue.interactive_wire import LOAD, UNLOAD, control_list
from promptmill_workers.host.client import HostDied
from promptmill_workers.host.model_hosts import ModelHosts
from promptmill_workers.worker.shutdown import Shutdown

log = logging.getLogger("promptmill.worker")

#: Seconds that a look into Redis waits, and before it is tried again after it was away.
LOOK_S = 2


class Control:
    """Reads orders in a thread of its own; each waits for its turn like a chunk does."""

    def __init__(
        self, worker_id: str, models: Collection[str], redis_url: str, hosts: ModelHosts, stop: Shutdown
    ) -> None:
        self._list = control_list(worker_id)
        self._models = models
        self._hosts = hosts
        self._stop = stop
        self._redis: Any = redis_client(
            redis_url, socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=ANSWER_TIMEOUT_S
        )

    def start(self) -> None:
        threading.Thread(target=self._run, name="control", daemon=True).start()

    def _run(self) -> None:
        while not self._stop.draining.is_set():
            try:
                found = self._redis.blpop([self._list], LOOK_S)
                if found is not None:
                    self._do(*json.loads(found[1]))
            except RedisError:
                self._stop.draining.wait(LOOK_S)
            except (HostDied, PromptmillError, OSError) as problem:
                log.error("an order could not be carried out: %s", problem)
            except Exception:
                log.exception("an order could not be carried out")

    def _do(self, order: str, model: str) -> None:
        if model not in self._models:
            log.warning("told to %s a model that this worker does not serve", order)
        elif order == LOAD:
            with self._hosts.session(model, urgent=True):
                log.info("%s is loaded, as it was told", model)
        elif order == UNLOAD:
            done = self._hosts.unload(model)
            log.info("%s is %s", model, "unloaded, as it was told" if done else "in use, or was not loaded")
