"""Requests with a waiting client, on their way through Redis: the names of the lists, and what is in them.

A server pushes a request to the list of its model and reads its own list of replies. A worker says that it took the
request, sends text as it comes, and ends with the answer or an error. Lists that are not read end by themselves.

Redis may lose any of this. Replies to a request are numbered, and a worker keeps them for a while: a server that hears
nothing, or misses one, has them told again from where it is. A request that is neither taken nor in its list is sent
again, under another id: what a worker says of an earlier sending is dropped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import orjson
from pydantic import ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from promptmill.queue.broker import KEY_PREFIX, key_of
from promptmill.tasks.templates import resolve_sampling
from promptmill.types import Extras, FinishReason, Message, Ok, Request, Sharing, Usage

#: Seconds after which a list of replies that is not read is forgotten, and what a worker keeps to tell it again.
FORGET_S = 120

#: Seconds after which a server counts as gone without a sign of life; it gives one every two.
SERVER_GONE_S = 8

#: Times that a request is tried whose worker or host was lost before it said anything.
MOST_TRIES = 3

#: Orders of an operator, on a worker's control list as JSON: [order, model].
LOAD, UNLOAD = "load", "unload"

#: Replies are JSON: [id, worker, number, kind, ...]. A text is followed by the log-probabilities of its
#: tokens or None, the number of the answer, and what answers; AGAIN, for what was lost, by an error's class and message
#: as FAILED is.
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
    """It has a life of SERVER_GONE_S: a server is there to read the replies."""
    return f"{KEY_PREFIX}live.server.{server_id}"


#: One message: role, content, and what else its template sees, as in Message.
Turn = tuple[str, str] | tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request and who waits for it.

    How long a client waits is the server's own business: clocks of two machines are not to be compared.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    #: Names this sending: one that is sent again has another.
    id: str
    server: str
    model: str
    sampling: dict[str, Any]
    messages: list[Turn] | None = None
    prompt: str | None = None
    stream: bool = False
    #: The id of the API key that asks; empty where none is needed.
    owner: str = ""

    def encode(self) -> bytes:
        return json.dumps({name: getattr(self, name) for name in FIELDS}, ensure_ascii=False).encode()

    @classmethod
    def decode(cls, data: bytes) -> LiveRequest:
        """Raises ValueError for what no server of ours has sent; its text quotes nothing of it."""
        try:
            return _REQUEST.validate_json(data)
        except ValidationError:
            raise ValueError("no request of a server of ours") from None

    def to_request(self, row: int) -> Request:
        """As an engine takes it. Raises BadParameter."""
        turns = None if self.messages is None else tuple(Message(*turn) for turn in self.messages)
        return Request(
            row, self.id, resolve_sampling({}, self.sampling), messages=turns, prompt=self.prompt, stream=self.stream,
            sharing=Sharing(self.owner),
        )  # fmt: skip


#: How a request travels: all of its fields by their names, and no others.
FIELDS = tuple(each.name for each in fields(LiveRequest))
_REQUEST = TypeAdapter(LiveRequest)


class AnswerMessage(TypedDict):
    """An answer as it travels. ``finished_at``: by the database's clock, which its server knows too."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    finished_at: float | None
    extras: Extras
    #: What answered: OpenAI's ``system_fingerprint``.
    backend: str


#: What each kind of reply holds.
_REPLIES: dict[str, TypeAdapter[Any]] = {
    TAKEN: TypeAdapter(tuple[()]),
    TEXT: TypeAdapter(tuple[str, list[dict[str, Any]] | None, NonNegativeInt, str]),
    DONE: TypeAdapter(tuple[AnswerMessage]),
    FAILED: TypeAdapter(tuple[str, str]),
    AGAIN: TypeAdapter(tuple[str, str]),
}
_HEAD = TypeAdapter(tuple[str, str, NonNegativeInt])


class BadReply(ValueError):
    """What no worker of ours has said, or one of another version. ``about``: id and number, where it has them."""

    def __init__(self, about: tuple[str, int] | None) -> None:
        super().__init__("no reply of a worker of ours")
        self.about = about


def reply_of(data: bytes) -> tuple[str, str, int, str, list[Any]]:
    """Id, worker, number and kind of a reply, and what it holds. Raises BadReply."""
    about = None
    try:
        sent = orjson.loads(data)
        request_id, worker, number = _HEAD.validate_python(sent[:3])
        about = request_id, number
        _, _, _, kind, *rest = sent
        _REPLIES[kind].validate_python(rest)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadReply(about) from None
    return request_id, worker, number, kind, rest


def answer_of(result: Ok, finished_at: float | None, backend: str) -> dict[str, Any]:
    """An answer as it travels: an :class:`AnswerMessage`."""
    return {
        "text": result.text, "finish_reason": result.finish_reason.value, "usage": asdict(result.usage),
        "finished_at": finished_at, "backend": backend,
        "extras": {name: value for name, value in asdict(result.extras).items() if value} if result.extras else {},
    }  # fmt: skip


def usage_of(answer: dict[str, Any]) -> Usage:
    return Usage(**answer["usage"])
