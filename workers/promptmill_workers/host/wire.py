"""Requests and results in the plain values that travel between a worker and its engine host."""

from __future__ import annotations

from typing import Any

from promptmill.types import ErrorClass, Extras, Failed, FinishReason, Message, Ok, Request, Result, Timing, Usage

#: More text of a live request: row, text, log-probabilities of its tokens or None, number of the answer.
LiveText = tuple[int, str, list[dict[str, Any]] | None, int]


def wire(request: Request) -> Any:
    turns = None if request.messages is None else tuple(map(_turn, request.messages))
    return request.row, turns, request.prompt, request.sampling, request.stream, request.own, request.sharing


def _turn(message: Message) -> tuple[Any, ...]:
    if message.own:
        return message.role, message.content, message.extra, message.own
    return (message.role, message.content, message.extra) if message.extra else (message.role, message.content)


def message_of(turn: tuple[Any, ...]) -> Message:
    """What :func:`wire` made of a message, as one again."""
    return Message(*turn[:3], own=turn[3] if len(turn) > 3 else ())


def result_of(
    answered: bool,
    row: int,
    kind: str,
    text: str,
    usage: tuple[int, int, int, int] | None,
    timing: tuple[float, float, float, float] | None,
    extras: Extras | None,
) -> Result:
    """What the host sent (``host_process.WireResult``) as a value."""
    if answered:
        assert usage is not None
        return Ok(row, text, FinishReason(kind), Usage(*usage), timing and Timing(*timing), extras)
    return Failed(row, ErrorClass(kind), text, usage and Usage(*usage), timing and Timing(*timing))
