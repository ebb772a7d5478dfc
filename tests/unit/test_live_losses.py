"""Requests and replies that Redis loses: the client has one answer all the same. Over a real Redis."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis

from promptmill.api.http.errors import ApiError
from promptmill.api.interactive import live
from promptmill.api.interactive.live import Live
from promptmill.api.interactive.pending_request import PendingRequest
from promptmill.database.clock import DatabaseClock
from promptmill.queue import heartbeats
from promptmill.queue.heartbeats import HEARTBEAT_S, heartbeat_key
from promptmill.queue.interactive_wire import (
    DONE,
    FAILED,
    MOST_TRIES,
    REPEAT,
    TAKEN,
    TEXT,
    BadReply,
    LiveRequest,
    answer_of,
    lane_list,
    live_queue,
    reply_list,
    reply_of,
)
from promptmill.types import FinishReason, Ok, Usage
from promptmill_workers.devices import Device
from promptmill_workers.engines.contract import EngineOptions
from promptmill_workers.host.client import HostConfig
from promptmill_workers.host.model_hosts import ModelHosts
from promptmill_workers.worker import interactive as worker_interactive
from promptmill_workers.worker.interactive import LiveLane
from promptmill_workers.worker.replies import Replies
from promptmill_workers.worker.shutdown import Shutdown
from tests.conftest import Clock

MODEL, WORKER = "echo", "here/cpu/1"
#: What the worker's engine says that it is.
BACKEND = "fp_echo_1"

OK = Ok(1, "a b", FinishReason.STOP, Usage(1, 0, 2), None)
ANSWER = answer_of(OK, None, BACKEND)


@pytest.fixture
def redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Redis with a worker's sign of life. Servers look for what is quiet at once."""
    monkeypatch.setattr(live, "WATCH_S", 0.1)
    monkeypatch.setattr(live, "QUIET_S", 0.3)
    with Redis.from_url(redis_url) as client:
        client.set(heartbeat_key(WORKER), "{}")
        yield client


@pytest.fixture
def replies(redis: Any) -> Replies:
    return Replies(redis, WORKER, Shutdown())


async def popped(redis: Any, name: str) -> Any:
    found = await asyncio.to_thread(redis.blpop, [name], 60)
    assert found is not None, f"nothing came in {name}"
    return found[1]


async def taken(redis: Any) -> LiveRequest:
    return LiveRequest.decode(await popped(redis, live_queue(MODEL)))


async def heard(call: PendingRequest) -> list[Any]:
    return [value if kind == DONE else value[0] async for kind, value in call.replies()]


@asynccontextmanager
async def closing(server: Live) -> AsyncIterator[Live]:
    try:
        yield server
    finally:
        await server.close()


def over(url: str, scene: Any) -> None:
    async def play() -> None:
        async with closing(Live(url, 20)) as server:
            server.start()
            async with server.call(MODEL, {}, None, prompt="x", stream=True) as call:
                await asyncio.wait_for(scene(call), 60)

    asyncio.run(play())


def lose(replies: Replies, request: LiveRequest, reply: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Say something that Redis takes and then has no more."""
    with monkeypatch.context() as lost:
        lost.setattr(replies, "_push", lambda lists: None)
        replies.say([(request, reply)])


@pytest.mark.parametrize("last_is_lost", [False, True])
def test_a_reply_that_is_lost_is_said_again(
    redis: Any, redis_url: str, replies: Replies, monkeypatch: pytest.MonkeyPatch, last_is_lost: bool
) -> None:
    async def scene(call: PendingRequest) -> None:
        request = await taken(redis)
        replies.say([(request, [TAKEN]), (request, [TEXT, "a ", None, 0, BACKEND])])
        lose(replies, request, [TEXT, "b", None, 0, BACKEND], monkeypatch)
        if last_is_lost:
            lose(replies, request, [DONE, ANSWER], monkeypatch)
        else:
            replies.say([(request, [DONE, ANSWER])])
        kind, *asked = json.loads(await popped(redis, lane_list(WORKER, MODEL)))
        assert kind == REPEAT
        replies.repeat(*asked)
        replies.repeat(*asked)
        assert await heard(call) == ["a ", "b", ANSWER]

    over(redis_url, scene)


def test_a_request_that_nobody_has_is_sent_again_and_answered_once(
    redis: Any, redis_url: str, replies: Replies
) -> None:
    async def scene(call: PendingRequest) -> None:
        lost = await taken(redis)
        again = await taken(redis)
        assert (again.prompt, again.id != lost.id) == (lost.prompt, True)
        # Somebody had it after all: what that one says reaches nobody, and it is told to stop.
        replies.say([(lost, [TAKEN]), (lost, [TEXT, "twice", None, 0, BACKEND])])
        assert json.loads(await popped(redis, lane_list(WORKER, MODEL))) == ["cancel", lost.id]
        replies.say([(lost, [DONE, ANSWER | {"text": "twice"}]), (again, [TAKEN]), (again, [DONE, ANSWER])])
        assert await heard(call) == [ANSWER]

    over(redis_url, scene)


def test_a_request_that_waits_in_its_list_is_left_there(redis: Any, redis_url: str, replies: Replies) -> None:
    async def scene(call: PendingRequest) -> None:
        await asyncio.sleep(1.5)
        assert redis.llen(live_queue(MODEL)) == 1
        request = await taken(redis)
        assert request.id == call.request.id
        replies.say([(request, [TAKEN]), (request, [DONE, ANSWER])])
        assert await heard(call) == [ANSWER]

    over(redis_url, scene)


def test_what_its_worker_has_forgotten_begins_again(redis: Any, redis_url: str, replies: Replies) -> None:
    async def scene(call: PendingRequest) -> None:
        request = await taken(redis)
        replies.say([(request, [TAKEN])])
        replies.forget([request.id])
        _, *asked = json.loads(await popped(redis, lane_list(WORKER, MODEL)))
        replies.repeat(*asked)
        again = await taken(redis)
        replies.say([(again, [TAKEN]), (again, [DONE, ANSWER])])
        assert await heard(call) == [ANSWER]

    over(redis_url, scene)


#: Ends of replies that are none: kind, and what it holds.
MALFORMED: list[list[Any]] = [
    [DONE], [DONE, "secret"], [DONE, {}], [DONE, {"text": "secret"}], [DONE, ANSWER | {"usage": {"secret": 1}}],
    [DONE, ANSWER | {"extras": ["secret"]}], [DONE, ANSWER, 5], [DONE, ANSWER | {"finish_reason": "secret"}],
    [TEXT], [TEXT, 5, None, 0, BACKEND], [TEXT, "secret", None, -1, BACKEND], [TEXT, "secret", {}, 0, BACKEND],
    [FAILED, "secret"], [FAILED, 1, 2], ["again", None, []], ["secret"], [["secret"]], [None], [],
]  # fmt: skip


def test_malformed_replies_are_dropped_and_the_true_one_is_asked_for(
    redis: Any, redis_url: str, replies: Replies, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(call: PendingRequest) -> None:
        request = await taken(redis)
        replies.say([(request, [TAKEN])])
        head = [request.id, WORKER, 1]
        strange = [b"{", b"[]", b"7", b"\xff", b"[" * 100_000, json.dumps([request.id, 5, 1, DONE]).encode()]
        redis.rpush(reply_list(request.server), *strange, json.dumps([*head, *MALFORMED[0]]))
        assert json.loads(await popped(redis, lane_list(WORKER, MODEL)))[0] == REPEAT
        replies.say([(request, [DONE, ANSWER])])
        assert await heard(call) == [ANSWER]

    over(redis_url, scene)
    assert caplog.text.count("is dropped") == 7
    assert "secret" not in caplog.text


@pytest.mark.parametrize("malformed", MALFORMED)
def test_no_malformed_reply_is_an_answer(malformed: list[Any]) -> None:
    with pytest.raises(BadReply, match=r"^no reply of a worker of ours$"):
        reply_of(json.dumps(["1", WORKER, 1, *malformed]).encode())


def test_a_chat_whose_worker_says_what_nobody_understands_ends(redis: Any, redis_url: str, replies: Replies) -> None:
    async def scene(call: PendingRequest) -> None:
        for _ in range(MOST_TRIES):
            request = await taken(redis)
            replies.say([(request, [TAKEN]), (request, [DONE, "of another version"])])
            _, *asked = json.loads(await popped(redis, lane_list(WORKER, MODEL)))
            replies.repeat(*asked)
        with pytest.raises(ApiError, match="could not answer") as refused:
            await heard(call)
        assert refused.value.status == 502

    over(redis_url, scene)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Tells the time to what looks for absences."""
    clock = Clock()
    for module in (heartbeats, worker_interactive):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def lane(redis: Any, redis_url: str) -> Iterator[LiveLane]:
    hosts = ModelHosts(HostConfig(MODEL, Device("cpu"), EngineOptions()))
    lane = LiveLane(MODEL, WORKER, redis_url, hosts, Shutdown(), DatabaseClock())
    yield lane
    lane._redis.close()


def test_a_server_is_gone_when_redis_has_missed_it_for_long(lane: LiveLane, clock: Clock) -> None:
    missed = []
    for _ in range(4):
        clock.advance(HEARTBEAT_S)
        missed.append(lane._gone({"server"}))
    assert missed == [set(), set(), set(), {"server"}]


def test_a_server_that_asks_is_there_though_redis_forgets_it_again_and_again(lane: LiveLane, clock: Clock) -> None:
    for _ in range(20):
        clock.advance(HEARTBEAT_S)
        assert lane._gone({"server"}) == set()
        lane._obey(None, [json.dumps([REPEAT, "a request", "server", 0]).encode()])


def test_two_short_absences_of_a_server_are_no_long_one(lane: LiveLane, clock: Clock) -> None:
    assert lane._gone({"server"}) == set()
    clock.advance(3600)
    assert lane._gone({"server"}) == set()


def test_a_worker_that_answers_is_there_though_redis_forgets_it_again_and_again(
    redis: Any, redis_url: str, replies: Replies, clock: Clock
) -> None:
    async def play() -> None:
        # It looks only when it is told to.
        async with closing(Live(redis_url, 20)) as server, server.call(MODEL, {}, None, prompt="x") as call:
            replies.say([(call.request, [TAKEN])])
            for number in range(10):
                replies.say([(call.request, [TEXT, f"{number} ", None, 0, BACKEND])])
                while data := redis.lpop(reply_list(call.request.server)):
                    server._take(data)
                redis.delete(heartbeat_key(WORKER))
                await server._look_at_workers()
                clock.advance(live.MISSED_S / 2)
            assert not call.ended
            clock.advance(live.MISSED_S / 2)
            await server._look_at_workers()
            assert call.ended

    asyncio.run(play())
