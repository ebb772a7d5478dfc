"""What a worker reads from its queue: only what it understands reaches Celery.

Celery ends its process over a message that is no JSON, and its logs quote those it cannot use. So a message is looked
at before, and written anew from the one thing that it says: which chunk. Whatever else it held is gone.
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

from promptmill.broker import PRIORITY_SEPARATOR, TASK_NAME, chunk_of
from promptmill.types import ChunkId

log = logging.getLogger("promptmill.worker")


def install() -> None:
    """For all applications of Celery in this process, which has one: a worker."""
    for scheme, transport in (("redis", "Transport"), ("rediss", "Transport"), ("sentinel", "SentinelTransport")):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{transport}"


class Gate(Redis):
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


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    def _get_client(self) -> Any:
        return Gate


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    Channel = Channel


class SentinelChannel(kombu_redis.SentinelChannel):  # type: ignore[misc]
    def _get_client(self) -> Any:
        return Gate


class SentinelTransport(kombu_redis.SentinelTransport):  # type: ignore[misc]
    Channel = SentinelChannel
