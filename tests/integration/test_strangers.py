"""Other programs on the same Redis database, by mistake or on purpose: no worker ends, none shows what they sent."""

from __future__ import annotations

import base64
import json
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import kombu.transport
import psutil
import pytest
from celery import Celery
from kombu.transport import _transport_cache as TRANSPORTS_SEEN
from redis import Redis

from promptmill.queue.broker import KEY_PREFIX, TASK_NAME, chunk_of, make_app, queue_name
from promptmill.queue.interactive_wire import LiveRequest, control_list, lane_list, live_queue
from promptmill.types import ChunkId
from promptmill_workers.worker import queue_gate
from tests.conftest import Command, wait_until

#: Stands for what nobody may find in a log.
SECRET = "blueberry"

QUEUE = queue_name("echo")


@pytest.fixture
def command(tmp_path: Path, redis_url: str) -> Command:
    made = Command(
        tmp_path,
        {
            "JOBS_DATABASE_URL": f"sqlite:///{tmp_path / 'jobs.sqlite'}", "JOBS_REDIS_URL": redis_url,
            "JOBS_LEASE_S": "6", "JOBS_RUNTIME_DIR": str(tmp_path / "run"),
        },
    )  # fmt: skip
    assert made("db", "upgrade").code == 0
    return made


@pytest.fixture
def worker(command: Command) -> Iterator[psutil.Process]:
    """The worker process itself; its supervisor would start another one in its place."""
    supervisor = command.start("worker", "--device", "cpu", "--model", "echo")
    wait_until(lambda: known(command)["state"] in ("idle", "busy"), "the worker is ready", 120)
    yield psutil.Process(known(command)["pid"])
    supervisor.terminate()
    try:
        supervisor.wait(timeout=60)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        raise


def known(command: Command) -> dict[str, Any]:
    """The first worker that the database knows."""
    found = json.loads(command("workers", "--json").out)
    return dict(found[0]) if found else {"state": None}


def message(**changes: Any) -> dict[str, Any]:
    """A message as ours are, with other parts in place of some; None leaves one out."""
    body = base64.b64encode(json.dumps([["01ABC", 0], {}, {}]).encode()).decode()
    whole = {
        "body": body, "content-type": "application/json", "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": TASK_NAME, "id": "1", "retries": 0, "eta": None, "expires": None},
        "properties": {
            "correlation_id": "1", "delivery_mode": 2, "body_encoding": "base64", "delivery_tag": "1", "priority": 0,
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
        },
    }  # fmt: skip
    return {name: value for name, value in (whole | changes).items() if value is not None}


def encoded(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


HEADERS = message()["headers"]

MALFORMED: list[object] = [
    f"not json {SECRET}", "", "\x00\xff", "[" * 100_000, [], [1, 2], 7, None, SECRET, {},
    {"body": SECRET}, {"__type__": "datetime", "__value__": SECRET}, message(body=SECRET), message(body=5),
    message(body=encoded(SECRET)), message(body=encoded({SECRET: 1})), message(body=encoded([])),
    message(body=encoded([[SECRET], {}, {}])), message(body=encoded([[1, "a"], {}, {}])),
    message(body=encoded([["01ABC", 10**30], {}, {}])), message(body=encoded([["01\x00", 0], {}, {}])),
    message(headers=None), message(headers=SECRET), message(headers={"task": [SECRET]}),
    message(headers=HEADERS | {"task": f"other.{SECRET}"}),
    # Of a chunk that is not there, with parts that Celery would trip over.
    message(properties=None), message(properties=SECRET), message(headers={"task": TASK_NAME}),
    message(headers=HEADERS | {"eta": SECRET, "expires": [SECRET], "timelimit": SECRET, "retries": SECRET}),
    message(headers=HEADERS | {"eta": "9999-12-31T00:00:00+00:00"}),
    message(**{"content-type": "application/x-python-serialize", "content-encoding": "binary"}),
    message(**{"content-type": None, "content-encoding": SECRET}),
]  # fmt: skip


def as_bytes(value: object) -> bytes:
    return value.encode(errors="surrogateescape") if isinstance(value, str) else json.dumps(value).encode()


def send_malformed(redis: Redis, worker_id: str) -> None:
    asked = LiveRequest("1", "server", "echo", {}, [("user", SECRET)])
    live: list[str | bytes] = [
        f"not json {SECRET}", "[]", "7", asked.encode().replace(b"[[", b"[5, ["),
        b'["1", "server", "echo", {}, null, "hi", false, ""]', asked.encode()[:-2],
        LiveRequest("1", "server", "echo", {SECRET: SECRET}, [("user", SECRET)]).encode(),
    ]  # fmt: skip
    orders = [SECRET, "[]", "7", '["cancel"]', '["cancel", 5]', '["repeat", "1", "a", "b"]', '{"a": 1}']
    for each in MALFORMED:
        redis.lpush(QUEUE, as_bytes(each))
        redis.lpush(f"{QUEUE}:5", as_bytes(each))
    redis.rpush(live_queue("echo"), *live)
    redis.rpush(lane_list(worker_id, "echo"), *orders)
    redis.rpush(control_list(worker_id), *orders)


def keep_unacknowledged(redis: Redis, each: object) -> None:
    """As if a worker had read it, long ago, and died."""
    tag = uuid.uuid4().hex
    redis.hset(f"{KEY_PREFIX}unacked", tag, as_bytes(each))
    redis.zadd(f"{KEY_PREFIX}unacked_index", {tag: 1.0})


def wait_until_read(redis: Redis, *lists: str) -> None:
    wait_until(lambda: not any(redis.exists(each) for each in lists), f"{', '.join(lists)} are read", 60)


def runs_a_job(command: Command) -> bool:
    path = command.folder / "prompts.jsonl"
    path.write_text('{"prompt": "hello"}\n{"prompt": "there"}\n')
    done = command("submit", str(path), "--model", "echo", "--wait", "-o", str(command.folder / f"{time.time()}.jsonl"))
    return done.code == 0


def logs(command: Command) -> str:
    return "\n".join(path.read_text(errors="replace") for path in command.folder.glob("*.log"))


def test_no_message_ends_a_worker_and_none_is_shown(command: Command, worker: psutil.Process, redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        worker_id = known(command)["id"]
        send_malformed(redis, worker_id)
        read = QUEUE, f"{QUEUE}:5", live_queue("echo"), lane_list(worker_id, "echo"), control_list(worker_id)
        wait_until_read(redis, *read)
    assert runs_a_job(command)
    assert worker.is_running()
    said = logs(command)
    assert SECRET not in said
    assert "is dropped" in said


@pytest.fixture
def channel(redis_url: str) -> Iterator[Any]:
    """Of a worker's connection to its queue, in a process that was none so far and is none afterwards."""
    with mock.patch.dict(kombu.transport.TRANSPORT_ALIASES), mock.patch.dict(TRANSPORTS_SEEN, clear=True):
        queue_gate.install()
        with make_app(redis_url).connection_for_read() as connection:
            yield connection.channel()


def test_messages_that_nobody_acknowledged_come_back_and_malformed_ones_go(
    channel: Any, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    strange: list[object] = [[each, "", QUEUE] for each in MALFORMED[4:24]]
    strange += [
        *MALFORMED,
        [message(), "", SECRET],
        [message(), "", 5],
        [message(properties={"priority": SECRET}), "", QUEUE],
    ]
    strange += [[message(properties={"priority": [1]}), "", QUEUE], [message()], {SECRET: 1}]
    ours = message(properties={"priority": 3}, headers=HEADERS | {"eta": SECRET})
    with Redis.from_url(redis_url) as redis:
        for each in [*strange, [ours, "", QUEUE]]:
            keep_unacknowledged(redis, each)
        channel.qos.restore_visible(num=1000, interval=1)
        assert redis.keys(f"{KEY_PREFIX}*") == [f"{QUEUE}:3".encode()]
        (back,) = redis.lrange(f"{QUEUE}:3", 0, -1)
    assert chunk_of(back) == ChunkId("01ABC", 0)
    assert SECRET not in back.decode() + caplog.text
    assert caplog.text.count("is dropped") == len(strange)


def test_a_message_whose_end_redis_is_not_told_keeps_no_other_away(
    channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel.basic_qos(0, 1, False)
    channel.qos.append(mock.Mock(delivery_info={"exchange": "", "routing_key": QUEUE}, _raw={}), "tag")
    assert not channel.qos.can_consume()

    def away(*given: Any) -> Any:
        raise ConnectionError

    monkeypatch.setattr(channel.qos, "_remove_from_indices", away)
    with pytest.raises(ConnectionError):
        channel.qos.ack("tag")
    assert channel.qos.can_consume()


def test_no_message_that_comes_back_ends_a_worker(command: Command, redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        for each in ["no json", [SECRET, "", QUEUE], [message(body=SECRET), "", QUEUE]]:
            keep_unacknowledged(redis, each)
        supervisor = command.start("worker", "--device", "cpu", "--model", "echo")
        try:
            wait_until_read(redis, f"{KEY_PREFIX}unacked", f"{KEY_PREFIX}unacked_index")
            assert runs_a_job(command)
        finally:
            supervisor.terminate()
            supervisor.wait(timeout=60)
    said = logs(command)
    assert SECRET not in said
    assert said.count("is dropped") == 3
    assert said.count("ready.") == 1


def test_nobody_shuts_a_worker_down_through_redis(command: Command, worker: psutil.Process, redis_url: str) -> None:
    stranger = Celery("stranger", broker=redis_url)
    stranger.control.shutdown()
    stranger.control.broadcast("pool_shrink", arguments={"n": 9})
    stranger.control.purge()
    assert not stranger.control.ping(timeout=1)
    assert runs_a_job(command)
    assert worker.is_running()


def test_all_keys_are_ours_by_name(command: Command, worker: psutil.Process, redis_url: str) -> None:
    assert runs_a_job(command)
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        strange = [each for each in redis.scan_iter("*") if KEY_PREFIX not in each]
        assert strange == []
        # Another application of Celery tidies up, with messages of the same names by default.
        redis.delete("unacked", "unacked_index", "_kombu.binding.celery", "celery")
    assert runs_a_job(command)
    assert worker.is_running()
