"""What a worker reads from its queue: only what it understands reaches Celery.

Celery ends its process over a message that is no JSON, and its logs quote those it cannot use. So a message is looked
at before, and written anew from the one thing that it says: which chunk. Whatever else it held is gone. The same goes
for messages that were not acknowledged in time and that kombu puts back into their queues.
"""

from __future__ import annotations

import base64
import json
import logging
import uuid
from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from redis import Redis

from promptmill.queue.broker import (
    PRIORITIES,
    PRIORITY_SEPARATOR,
    QUEUE_PREFIX,
    TASK_NAME,
    chunk_in,
    chunk_of,
    list_name,
)
from promptmill.types import ChunkId

log = logging.getLogger("promptmill.worker")


def install() -> None:
    """For all applications of Celery in this process, which has one: a worker."""
    for scheme, transport in (("redis", "Transport"), ("rediss", "Transport"), ("sentinel", "SentinelTransport")):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{transport}"


class QueueGate(Redis):
    """A client that hands on no message but ours."""

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        found = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name != "BRPOP" or not found:
            return found
        key, message = found
        chunk = chunk_of(message)
        if chunk is None:
            # To Celery, nothing came.
            log.warning("a message of %d bytes in %s is dropped: it is none of ours", len(message), key.decode())
            return None
        return key, _message(chunk, key.decode())


def _message(chunk: ChunkId, key: str) -> bytes:
    """As Celery writes it, in its second protocol."""
    queue, _, priority = key.partition(PRIORITY_SEPARATOR)
    task_id = str(uuid.uuid4())
    body = json.dumps([[chunk.job_id, chunk.number], {}, None]).encode()
    message = {
        "body": base64.b64encode(body).decode(), "content-type": "application/json", "content-encoding": "utf-8",
        "headers": {
            "lang": "py", "task": TASK_NAME, "id": task_id, "root_id": task_id, "parent_id": None, "group": None,
            "retries": 0, "timelimit": [None, None], "eta": None, "expires": None,
            "argsrepr": repr((chunk.job_id, chunk.number)), "kwargsrepr": "{}",
        },
        "properties": {
            "correlation_id": task_id, "delivery_mode": 2, "body_encoding": "base64", "delivery_tag": task_id,
            "priority": int(priority or 0), "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }  # fmt: skip
    return json.dumps(message).encode()


class QoS(kombu_redis.QoS):  # type: ignore[misc]
    def ack(self, delivery_tag: Any) -> None:
        """Raises where Redis cannot be told. The message is no longer held here all the same.

        With kombu's own, a worker whose chunks all end while Redis is away reads no message any more, and so never
        finds its connection lost. Redis gives the message out again, and its chunk is found done.
        """
        try:
            self._remove_from_indices(delivery_tag).execute()
        finally:
            super(kombu_redis.QoS, self).ack(delivery_tag)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Put a message back into its queue that was not acknowledged; what is none of ours goes."""

        def restore(pipe: Any) -> None:
            kept = pipe.hget(self.unacked_key, tag)
            pipe.multi()
            self._remove_from_indices(tag, pipe)
            if kept is None:
                return
            found = _kept(kept)
            if found is None:
                log.warning("a message of %d bytes in %s is dropped: it is none of ours", len(kept), self.unacked_key)
            else:
                chunk, key = found
                (pipe.lpush if leftmost else pipe.rpush)(key, _message(chunk, key))

        with self.channel.conn_or_acquire(client) as redis:
            redis.transaction(restore, self.unacked_key)


def _kept(kept: bytes) -> tuple[ChunkId, str] | None:
    """The chunk and the list of a message as kombu keeps it: [message, exchange, routing key]."""
    try:
        message, _, queue = json.loads(kept)
        priority = message["properties"]["priority"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    chunk = chunk_in(message)
    if chunk is None or not isinstance(queue, str) or not queue.startswith(QUEUE_PREFIX) or priority not in PRIORITIES:
        return None
    return chunk, list_name(queue, int(priority))


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    QoS = QoS

    def _get_client(self) -> Any:
        return QueueGate


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    Channel = Channel


class SentinelChannel(kombu_redis.SentinelChannel):  # type: ignore[misc]
    QoS = QoS

    def _get_client(self) -> Any:
        return QueueGate


class SentinelTransport(kombu_redis.SentinelTransport):  # type: ignore[misc]
    Channel = SentinelChannel
