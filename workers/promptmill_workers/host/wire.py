"""The wire between a worker and its engine host: requests one way, results the other.

A dataclass travels as the values of its fields, because a tuple is pickled several times faster. Both ends take the
fields from the dataclass, by name: a field that is added to it travels too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

from promptmill.types import Failed, Message, Ok, Request, Result, Timing, Usage
from promptmill_workers.engines.contract import EngineRequest

T = TypeVar("T")

#: A request or a result as it travels. The first value of a request is its row.
Packed = tuple[Any, ...]


class LiveText(NamedTuple):
    """More text of a live request."""

    row: int
    text: str
    #: Those of its tokens, where they are asked for.
    logprobs: list[dict[str, Any]] | None
    #: Which of several answers it belongs to, from 0.
    answer: int


def _names(kind: type[Any]) -> list[str]:
    return [each.name for each in fields(kind)]


class _Plain(Generic[T]):
    """Values of a dataclass by the names of its fields, and back."""

    def __init__(self, kind: type[T], names: Collection[str]) -> None:
        self._kind = kind
        self._names = [each for each in _names(kind) if each in names]
        self.values = attrgetter(*self._names)

    def made(self, values: Packed, **others: Any) -> T:
        others.update(zip(self._names, values, strict=True))
        return self._kind(**others)


#: What a request of a job and one of an engine have in common, without the messages.
_REQUEST = _Plain(EngineRequest, {*_names(Request)} - {"messages"})
_MESSAGE = _Plain(Message, _names(Message))
_OK = _Plain(Ok, {*_names(Ok)} - {"usage", "timing"})
_FAILED = _Plain(Failed, {*_names(Failed)} - {"usage", "timing"})
_usage_values = attrgetter(*_names(Usage))


def pack_request(request: Request) -> Packed:
    turns = None if request.messages is None else [_MESSAGE.values(each) for each in request.messages]
    return request.row, turns, _REQUEST.values(request)


def request_of(packed: Packed, key: int, *, urgent: bool) -> EngineRequest:
    """What :func:`pack_request` packed, for an engine."""
    _, turns, values = packed
    messages = None if turns is None else tuple(map(_MESSAGE.made, turns))
    return _REQUEST.made(values, key=key, urgent=urgent, messages=messages)


def pack_result(result: Result) -> Packed:
    usage, timing, answered = result.usage, result.timing, isinstance(result, Ok)
    used, times = usage and _usage_values(usage), timing and tuple(timing)
    return answered, (_OK if answered else _FAILED).values(result), used, times


def result_of(packed: Packed) -> Result:
    """What :func:`pack_result` packed."""
    answered, values, used, times = packed
    usage, timing = used and Usage(*used), times and Timing(*times)
    return (_OK if answered else _FAILED).made(values, usage=usage, timing=timing)
