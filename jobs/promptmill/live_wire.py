"""Requests that somebody waits for, on their way through Redis: the names of the lists, and what is in them.

A server pushes a request to the list of its model and reads its own list of replies. A worker says that it took the
request, sends text as it comes, and ends with the answer or an error. Lists forget themselves when nobody reads.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from promptmill.broker import queue_name
from promptmill.prompts import resolve_sampling
from promptmill.types import Extras, Message, Ok, Request, Sharing, Usage

#: Seconds after which a list of replies that nobody reads is forgotten.
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

#: Of replies, the second part of each; the first is the request's id. A text is followed by the log-probabilities of
#: its tokens or None, and the number of the answer.
TAKEN, TEXT, DONE, FAILED, AGAIN = "taken", "text", "done", "failed", "again"


def live_queue(model: str) -> str:
    return f"live.{queue_name(model)}"


def cancel_list(worker_id: str, model: str) -> str:
    return f"live.cancel.{worker_id}.{queue_name(model)}"


def control_list(worker_id: str) -> str:
    return f"live.control.{worker_id}"


def reply_list(server_id: str) -> str:
    return f"live.reply.{server_id}"


def beat_key(worker_id: str) -> str:
    """JSON with a life of GONE_S: the worker lives, what it does, and how long its commits took."""
    return f"live.worker.{worker_id}"


def server_key(server_id: str) -> str:
    """It has a life of SERVER_GONE_S: somebody is there to read the replies."""
    return f"live.server.{server_id}"


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request and who waits for it. ``messages`` are (role, content) or (role, content, extra), as in Message."""

    id: str
    server: str
    model: str
    sampling: dict[str, Any]
    messages: list[tuple[str, ...]] | None = None
    prompt: str | None = None
    stream: bool = False
    #: Seconds since the epoch: when it was sent, and until when somebody waits.
    sent_at: float = 0.0
    until: float = 0.0
    tries: int = 1
    #: The id of the API key that asks; empty where none is needed.
    owner: str = ""

    def encode(self) -> bytes:
        return json.dumps(
            [self.id, self.server, self.model, self.sampling, self.messages, self.prompt, self.stream, self.sent_at,
             self.until, self.tries, self.owner], ensure_ascii=False,
        ).encode()  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> LiveRequest:
        return cls(*json.loads(data))

    def to_request(self, row: int) -> Request:
        """As an engine takes it. Raises BadParameter."""
        turns = None if self.messages is None else tuple(Message(*turn) for turn in self.messages)
        return Request(
            row, self.id, resolve_sampling({}, self.sampling), messages=turns, prompt=self.prompt, stream=self.stream,
            sharing=Sharing(self.owner),
        )  # fmt: skip


def answer_of(result: Ok) -> dict[str, Any]:
    """An answer as it travels."""
    return {
        "text": result.text, "finish_reason": result.finish_reason.value, "usage": asdict(result.usage),
        "timing": asdict(result.timing) if result.timing else None,
        "extras": {name: value for name, value in asdict(result.extras).items() if value} if result.extras else {},
    }  # fmt: skip


def usage_of(answer: dict[str, Any]) -> Usage:
    return Usage(**answer["usage"])


def extras_of(answer: dict[str, Any]) -> Extras:
    return Extras(**answer["extras"])
