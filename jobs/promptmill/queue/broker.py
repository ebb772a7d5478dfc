"""Celery over Redis: one message a chunk, holding ids only. The database is the truth; Redis only wakes workers."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from promptmill.core.addresses import masked
from promptmill.core.redis_client import celery_broker, redis_client
from promptmill.errors import BrokerError, first_line
from promptmill.types import ChunkId

if TYPE_CHECKING:
    from celery import Celery

#: All of our keys begin so: other programs may use the same Redis database, other applications of Celery among them.
KEY_PREFIX = "promptmill."

#: And the queues of chunks.
QUEUE_PREFIX = f"{KEY_PREFIX}bulk."

TASK_NAME = "promptmill.run_chunk"

#: Priorities of jobs. Over Redis each is a list of its own, and 0 is read first.
PRIORITIES = range(10)

#: Between a queue's name and its priority in the name of the list.
PRIORITY_SEPARATOR = ":"

#: The oldest Redis: LPOP of several and ZRANGE by scores came with it.
OLDEST = (6, 2)

#: Seconds before Redis hands an unacknowledged message out again. Far beyond any chunk: an early redelivery would run
#: a chunk twice, and recovery is the business of the ledger's leases, which take LEASE_S.
VISIBILITY_TIMEOUT_S = 24 * 3600

#: Seconds a program waits for Redis, to connect and for each answer, before it says that there is none: a worker, and
#: who only publishes or looks, for whom a person or a scraper waits.
CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 20
ASK_TIMEOUT_S = 4

#: Messages read at once when a queue is searched.
PAGE = 1000


#: Celery puts its modules together as they are first asked for: two threads that do so at once get half a module.
_IMPORTING = threading.Lock()


def queue_name(model: str) -> str:
    """The queue of a model's chunks."""
    return f"{QUEUE_PREFIX}{key_of(model)}"


def key_of(model: str) -> str:
    """The part of a key that names a model: readable, and distinct for distinct models."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rpartition("/")[2])[:40]
    return f"{readable}.{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def make_app(redis_url: str, answer_s: float = ANSWER_TIMEOUT_S) -> Celery:
    """The Celery application. Nothing is connected yet. ``answer_s``: how long it waits for each answer of Redis."""
    with _IMPORTING:
        from celery import Celery

    broker, secured, reaching = celery_broker(
        redis_url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        # A Redis that hangs is like one that is away. Workers block on it for a second at a time.
        socket_timeout=answer_s,
    )
    app = Celery("promptmill", broker=broker, set_as_current=False)
    app.conf.update(
        **secured,
        task_serializer="json",
        # A message never carries code.
        accept_content=["json"],
        # Results live in SQL.
        task_ignore_result=True,
        # A worker holds what it runs and nothing more; the message stays until the chunk has ended.
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        # Threads that publish at once share these; a message takes milliseconds.
        broker_pool_limit=2,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "priority_steps": list(PRIORITIES),
            "sep": PRIORITY_SEPARATOR,
            "queue_order_strategy": "priority",
            "socket_keepalive": True,
            **reaching,
            "health_check_interval": 25,
            # Named, and not by ``global_keyprefix``: kombu reads its index of unacknowledged messages without that.
            "unacked_key": f"{KEY_PREFIX}unacked",
            "unacked_index_key": f"{KEY_PREFIX}unacked_index",
            "unacked_mutex_key": f"{KEY_PREFIX}unacked_mutex",
        },
        # Outages of Redis are waited out.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A chunk goes on while Redis is away; a second delivery finds it done.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        # Any program on the same Redis database could shut workers down; orders come by lists of our own.
        worker_enable_remote_control=False,
        task_create_missing_queues=True,
        task_default_queue=f"{KEY_PREFIX}bulk",
        enable_utc=True,
    )
    return app


class Broker:
    """Publishes chunk ids, and looks at how many wait."""

    def __init__(self, redis_url: str, app: Any | None = None) -> None:
        self._url = redis_url
        self._made = app
        self._making = threading.Lock()

    @property
    def _app(self) -> Any:
        """Made when something is published: who only looks does not wait for Celery's modules."""
        with self._making:
            if self._made is None:
                self._made = make_app(self._url, ASK_TIMEOUT_S)
            return self._made

    def publish(self, chunks: Sequence[ChunkId], model: str, priority: int) -> None:
        """Send one message a chunk. Raises :class:`BrokerError` when Redis cannot be reached."""
        if not chunks:
            return
        from kombu.exceptions import OperationalError

        queue = queue_name(model)
        try:
            with self._app.producer_pool.acquire(block=True) as producer:
                for chunk in chunks:
                    self._app.send_task(
                        TASK_NAME, args=(chunk.job_id, chunk.number), queue=queue, priority=priority,
                        producer=producer, retry=False,
                    )  # fmt: skip
        except (OperationalError, OSError) as problem:
            raise self._unreachable(problem) from problem

    def waiting(self, models: Sequence[str]) -> list[int]:
        """Messages that wait in the queue of each model, over all priorities."""
        from redis.exceptions import RedisError

        try:
            with self._redis() as redis:
                pipe = redis.pipeline()
                for model in models:
                    for key in _lists(model):
                        pipe.llen(key)
                each = iter(pipe.execute())
            return [sum(islice(each, len(PRIORITIES))) for _ in models]
        except (RedisError, OSError) as problem:
            raise self._unreachable(problem) from problem

    def waiting_chunks(self, model: str) -> set[ChunkId]:
        """The chunks whose messages wait in the model's queue, over all priorities. Reads each message."""
        from redis.exceptions import RedisError

        found: set[ChunkId] = set()
        try:
            with self._redis() as redis:
                for key in _lists(model):
                    found.update(_chunks(redis, key))
        except (RedisError, OSError) as problem:
            raise self._unreachable(problem) from problem
        return found

    def look_up(self, keys: Sequence[str]) -> list[bytes | None]:
        """What each key holds, if it is there. Nothing is while Redis is away."""
        if not keys:
            return []
        from redis.exceptions import RedisError

        try:
            with self._redis() as redis:
                return list(redis.mget(keys))
        except (RedisError, OSError):
            return [None] * len(keys)

    def ping(self) -> None:
        """Raises :class:`BrokerError` when Redis does not answer, or is too old."""
        from redis.exceptions import RedisError, ResponseError

        version = ""
        try:
            with self._redis() as redis:
                redis.ping()
                # A user may not be allowed to ask.
                with contextlib.suppress(ResponseError):
                    version = str(redis.info("server").get("redis_version", ""))
        except (RedisError, OSError) as problem:
            raise self._unreachable(problem) from problem
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers and numbers < OLDEST:
            raise BrokerError(
                f"Redis at {masked(self._url)} is {version[:20]}, and {'.'.join(map(str, OLDEST))} or newer is needed",
                hint="Name a newer server in JOBS_REDIS_URL.",
            )

    def _redis(self) -> Any:
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        # Its own default is to try four times.
        return redis_client(
            self._url, socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=ASK_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )  # fmt: skip

    def _unreachable(self, problem: Exception) -> BrokerError:
        from redis.exceptions import AuthenticationError, ResponseError

        # Sentinel's client adds the whole of itself, Celery's wraps what it was told.
        said = first_line(problem).partition(" : <")[0]
        if isinstance(problem.__cause__ or problem, AuthenticationError | ResponseError):
            return BrokerError(
                f"Redis at {masked(self._url)} refuses: {said}",
                hint="Check user, password and the number of the database in JOBS_REDIS_URL, and what the user may do.",
            )
        return BrokerError(
            f"cannot reach Redis at {masked(self._url)}: {said}",
            hint="Check that it runs and that JOBS_REDIS_URL names it ('promptmill config' shows it).",
        )


def _lists(model: str) -> list[str]:
    """The lists of a model's queue, one a priority."""
    return [list_name(queue_name(model), priority) for priority in PRIORITIES]


def list_name(queue: str, priority: int) -> str:
    """The list of one priority."""
    return queue if priority == 0 else f"{queue}{PRIORITY_SEPARATOR}{priority}"


def _chunks(redis: Any, key: str) -> Iterator[ChunkId]:
    # New messages come in at the front: a page that was read may be read again, but none is passed over.
    begin = 0
    while messages := redis.lrange(key, begin, begin + PAGE - 1):
        for message in messages:
            chunk = chunk_of(message)
            if chunk is not None:
                yield chunk
        begin += PAGE


def chunk_of(message: bytes) -> ChunkId | None:
    """What a message is about; None for one that is none of ours."""
    try:
        return chunk_in(json.loads(message))
    except (ValueError, RecursionError):
        return None


def chunk_in(sent: Any) -> ChunkId | None:
    """The same of one that is no text any more."""
    try:
        (job_id, number), *_ = json.loads(base64.b64decode(sent["body"], validate=True))
        is_ours = sent["headers"]["task"] == TASK_NAME
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not is_ours or not isinstance(job_id, str) or not re.fullmatch(r"[0-9A-Za-z]{1,26}", job_id):
        return None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
        return None
    return ChunkId(job_id, number)
