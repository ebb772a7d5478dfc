"""Requests that somebody waits for, on their way through Redis: the names of the lists, and what is in them.

A server pushes a request to the list of its model and reads its own list of replies. A worker says that it took the
request, sends text as it comes, and ends with the answer or an error. Lists forget themselves when nobody reads.

Redis may lose any of this. Replies to a request are numbered, and a worker keeps them for a while: a server that hears
nothing, or misses one, has them told again from where it is. A request that is neither taken nor in its list is sent
again, under another id: what a worker says of an earlier sending reaches nobody.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from promptmill.broker import KEY_PREFIX, key_of
from promptmill.prompts import resolve_sampling
from promptmill.types import Extras, Message, Ok, Request, Sharing, Usage

#: Seconds after which a list of replies that nobody reads is forgotten, and what a worker keeps to tell it again.
FORGET_S = 120

#: Seconds between a worker's signs of life, and after which it counts as gone without one.
BEAT_S = 3.0
GONE_S = 15

#: Seconds after which a server counts as gone without a sign of life; it gives one every two.
SERVER_GONE_S = 8

#: Times that a request is tried whose worker or host was lost before it said anything.
MOST_TRIES = 3

#: Orders of an operator, on a worker's control list as JSON: [order, model].
LOAD, UNLOAD = "load", "unload"

#: Of replies, which are JSON: [id, worker, number, kind, ...]. A text is followed by the log-probabilities of its
#: tokens or None, and the number of the answer; AGAIN, for what was lost, by an error's class and message as FAILED is.
TAKEN, TEXT, DONE, FAILED, AGAIN = "taken", "text", "done", "failed", "again"

#: The kinds that are the last word on a request.
LAST = (DONE, FAILED, AGAIN)

#: What a server tells the lane of a worker, as JSON: [CANCEL, id], or [REPEAT, id, server, number].
CANCEL, REPEAT = "cancel", "repeat"


def live_queue(model: str) -> str:
    return f"{KEY_PREFIX}live.queue.{key_of(model)}"


def lane_list(worker_id: str, model: str) -> str:
    return f"{KEY_PREFIX}live.lane.{worker_id}.{key_of(model)}"


def control_list(worker_id: str) -> str:
    return f"{KEY_PREFIX}live.control.{worker_id}"


def reply_list(server_id: str) -> str:
    return f"{KEY_PREFIX}live.reply.{server_id}"


def server_key(server_id: str) -> str:
    """It has a life of SERVER_GONE_S: somebody is there to read the replies."""
    return f"{KEY_PREFIX}live.server.{server_id}"


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request and who waits for it. ``messages`` are (role, content) or (role, content, extra), as in Message.

    How long somebody waits is the server's own business: clocks of two machines are not to be compared.
    """

    #: Of this sending: one that is sent again has another.
    id: str
    server: str
    model: str
    sampling: dict[str, Any]
    messages: list[tuple[str, ...]] | None = None
    prompt: str | None = None
    stream: bool = False
    #: The id of the API key that asks; empty where none is needed.
    owner: str = ""

    def encode(self) -> bytes:
        return json.dumps(
            [self.id, self.server, self.model, self.sampling, self.messages, self.prompt, self.stream, self.owner],
            ensure_ascii=False,
        ).encode()

    @classmethod
    def decode(cls, data: bytes) -> LiveRequest:
        """Raises ValueError for what no server of ours has sent; its text quotes nothing of it."""
        try:
            found = _AS_SENT.validate_python(tuple(json.loads(data)))
        except (ValueError, TypeError, ValidationError, RecursionError):
            raise ValueError("no request of a server of ours") from None
        return cls(*found)

    def to_request(self, row: int) -> Request:
        """As an engine takes it. Raises BadParameter."""
        turns = None if self.messages is None else tuple(Message(*turn) for turn in self.messages)
        return Request(
            row, self.id, resolve_sampling({}, self.sampling), messages=turns, prompt=self.prompt, stream=self.stream,
            sharing=Sharing(self.owner),
        )  # fmt: skip


#: The fields of a LiveRequest in their order.
_AS_SENT: TypeAdapter[Any] = TypeAdapter(
    tuple[str, str, str, dict[str, Any], list[tuple[str, str] | tuple[str, str, str]] | None, str | None, bool, str]
)


def answer_of(result: Ok, finished_at: float | None) -> dict[str, Any]:
    """An answer as it travels. ``finished_at``: by the database's clock, which its server knows too."""
    return {
        "text": result.text, "finish_reason": result.finish_reason.value, "usage": asdict(result.usage),
        "finished_at": finished_at,
        "extras": {name: value for name, value in asdict(result.extras).items() if value} if result.extras else {},
    }  # fmt: skip


def usage_of(answer: dict[str, Any]) -> Usage:
    return Usage(**answer["usage"])


def extras_of(answer: dict[str, Any]) -> Extras:
    return Extras(**answer["extras"])
