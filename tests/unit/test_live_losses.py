"""Requests and replies that Redis loses: the client has one answer all the same. Over a real Redis."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from promptmill.api import interactive
from promptmill.api.http.errors import ApiError
from promptmill.api.interactive import Live, PendingRequest
from promptmill.queue.heartbeats import heartbeat_key
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
from promptmill_workers.worker.replies import Replies
from promptmill_workers.worker.shutdown import Shutdown

MODEL, WORKER = "echo", "here/cpu/1"
#: What the worker's engine says that it is.
BACKEND = "fp_echo_1"

OK = Ok(1, "a b", FinishReason.STOP, Usage(1, 0, 2), None)
ANSWER = answer_of(OK, None, BACKEND)


@pytest.fixture
def redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Redis with a worker's sign of life. Servers look for what is quiet at once."""
    monkeypatch.setattr(interactive, "WATCH_S", 0.1)
    monkeypatch.setattr(interactive, "QUIET_S", 0.3)
    with Redis.from_url(redis_url) as client:
        client.set(heartbeat_key(WORKER), "{}")
        yield client


@pytest.fixture
def replies(redis: Any) -> Replies:
    return Replies(redis, WORKER, Shutdown())


async def popped(redis: Any, name: str) -> Any:
    found = await asyncio.to_thread(redis.blpop, [name], 10)
    assert found is not None, f"nothing came in {name}"
    return found[1]


async def taken(redis: Any) -> LiveRequest:
    return LiveRequest.decode(await popped(redis, live_queue(MODEL)))


async def heard(call: PendingRequest) -> list[Any]:
    return [value if kind == DONE else value[0] async for kind, value in call.replies()]


def over(url: str, scene: Any) -> None:
    async def play() -> None:
        server = Live(url, 20)
        server.start()
        try:
            async with server.call(MODEL, {}, None, prompt="x", stream=True) as call:
                await asyncio.wait_for(scene(call), 15)
        finally:
            await server.close()

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
