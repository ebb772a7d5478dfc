"""What a worker says to the servers whose requests it holds, in order, each reply numbered; Redis may lose some."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from promptmill.queue.interactive_wire import AGAIN, FORGET_S, LAST, LiveRequest, reply_list
from promptmill.types import ErrorClass
from promptmill_workers.worker.shutdown import Shutdown

#: Seconds before Redis is tried again after it was away.
AWAY_S = 1.0

#: Requests that have ended whose replies are kept. What is forgotten is computed again, if need be.
MOST_KEPT = 256


@dataclass(slots=True)
class Said:
    """All replies to one request, as they were sent."""

    server: str
    replies: list[bytes] = field(default_factory=list)


class Replies:
    """Those of one lane. Any of its threads may speak; each reply is in Redis before the next one is numbered."""

    def __init__(self, redis: Any, worker_id: str, stop: Shutdown) -> None:
        self._redis = redis
        self._worker_id = worker_id
        self._stop = stop
        self._said: dict[str, Said] = {}
        #: Requests that have ended -> when, the earliest first.
        self._ended: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def say(self, replies: Sequence[tuple[LiveRequest, list[Any]]]) -> None:
        """In one round trip. A Redis that is away is waited for: a client waits for the answer."""
        if not replies:
            return
        with self._lock:
            lists: dict[str, list[bytes]] = defaultdict(list)
            for request, reply in replies:
                said = self._said.setdefault(request.id, Said(request.server))
                data = self._encode(request.id, len(said.replies), reply)
                said.replies.append(data)
                lists[request.server].append(data)
                if reply[0] in LAST:
                    self._ended[request.id] = time.monotonic()
            self._forget_old()
            self._push(lists)

    def repeat(self, request_id: str, server: str, number: int) -> None:
        """Say again what was said from this number on. A request that is not known here is to begin again."""
        with self._lock:
            said = self._said.get(request_id)
            if said is None:
                lost = [AGAIN, ErrorClass.WORKER_LOST.value, "its worker does not know it any more"]
                self._push({server: [self._encode(request_id, number, lost)]})
            elif replies := said.replies[max(0, number) :]:
                self._push({said.server: replies})

    def forget(self, request_ids: Iterable[str]) -> None:
        """Their clients are gone."""
        with self._lock:
            for each in request_ids:
                self._said.pop(each, None)
                self._ended.pop(each, None)

    def _forget_old(self) -> None:
        old = time.monotonic() - FORGET_S
        while self._ended and (len(self._ended) > MOST_KEPT or next(iter(self._ended.values())) < old):
            self._said.pop(self._ended.popitem(last=False)[0], None)

    def _encode(self, request_id: str, number: int, reply: list[Any]) -> bytes:
        return json.dumps([request_id, self._worker_id, number, *reply], ensure_ascii=False).encode()

    def _push(self, lists: dict[str, list[bytes]]) -> None:
        """A server takes the first of what is pushed twice because Redis went away meanwhile."""
        while True:
            try:
                pipe = self._redis.pipeline(transaction=False)
                for server, data in lists.items():
                    pipe.rpush(reply_list(server), *data)
                    pipe.expire(reply_list(server), FORGET_S)
                pipe.execute()
                return
            except RedisError:
                if self._stop.abandoning.wait(AWAY_S):
                    return
