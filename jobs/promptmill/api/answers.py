"""Answers as OpenAI's API has them: whole, and as chunks of a stream."""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Iterator
from typing import Any

from ulid import ULID

from promptmill.api.questions import Question
from promptmill.live_wire import usage_of
from promptmill.result_formats import openai_choice, openai_usage
from promptmill.types import Usage

#: What changes the answers of a model; clients compare it. The engine's versions are in /v1/system/status.
FINGERPRINT = "promptmill"


def new_id(raw: bool) -> str:
    return f"{'cmpl' if raw else 'chatcmpl'}-{str(ULID()).lower()}"


def choices_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to one prompt: the first one and those of a request with ``n`` above 1."""
    extras = answer["extras"]
    first = {
        "text": answer["text"], "finish_reason": answer["finish_reason"], "reasoning": extras.get("reasoning"),
        "logprobs": extras.get("logprobs"),
    }  # fmt: skip
    return [first, *(extras.get("choices") or ())]


def whole(question: Question, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of a completion: the choices of all prompts, their tokens added up."""
    raw = question.messages is None
    choices = [each for answer in answers for each in choices_of(answer)]
    return {
        "id": new_id(raw),
        "object": "text_completion" if raw else "chat.completion",
        "created": int(time.time()),
        "model": question.model,
        "choices": [openai_choice(index, each, raw) for index, each in enumerate(choices)],
        "usage": openai_usage(total_usage(answers)),
        "system_fingerprint": FINGERPRINT,
    }


def total_usage(answers: list[dict[str, Any]]) -> Usage:
    counts = [usage_of(each) for each in answers]
    return Usage(
        sum(each.prompt_tokens for each in counts), sum(each.cached_tokens for each in counts),
        sum(each.output_tokens for each in counts), sum(each.reasoning_tokens for each in counts),
    )  # fmt: skip


def embeddings(question: Question, answers: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = total_usage(answers).prompt_tokens
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _vector(each["extras"]["embedding"], question.base64)}
            for index, each in enumerate(answers)
        ],
        "model": question.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vector(numbers: list[float], as_base64: bool) -> list[float] | str:
    if not as_base64:
        return numbers
    floats = array("f", numbers)
    return base64.b64encode(floats.tobytes()).decode()


class Chunks:
    """The chunks of one streamed completion."""

    def __init__(self, question: Question) -> None:
        self._raw = question.messages is None
        self._include_usage = question.include_usage
        self._frame = {
            "id": new_id(self._raw), "object": "text_completion" if self._raw else "chat.completion.chunk",
            "created": int(time.time()), "model": question.model, "system_fingerprint": FINGERPRINT,
        }  # fmt: skip
        self._told = 0

    def begin(self) -> Iterator[dict[str, Any]]:
        if not self._raw:
            yield self._chunk(0, delta={"role": "assistant", "content": "", "refusal": None})

    def text(self, text: str) -> dict[str, Any]:
        self._told += len(text)
        return self._piece(0, text)

    def end(self, answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What has not been told, why each choice ended, and the tokens if they were asked for."""
        for index, choice in enumerate(choices_of(answer)):
            rest = choice["text"][self._told :] if index == 0 else choice["text"]
            if choice.get("reasoning") and not self._raw:
                yield self._chunk(index, delta={"reasoning_content": choice["reasoning"]})
            logprobs = openai_choice(index, choice, self._raw)["logprobs"]
            if rest or logprobs:
                yield self._piece(index, rest, logprobs)
            nothing: dict[str, Any] = {"text": ""} if self._raw else {"delta": {}}
            yield self._chunk(index, finish_reason=choice["finish_reason"], **nothing)
        if self._include_usage:
            yield self._frame | {"choices": [], "usage": openai_usage(usage_of(answer))}

    def _piece(self, index: int, text: str, logprobs: Any = None) -> dict[str, Any]:
        what: dict[str, Any] = {"text": text} if self._raw else {"delta": {"content": text}}
        return self._chunk(index, logprobs=logprobs, **what)

    def _chunk(
        self, index: int, *, logprobs: Any = None, finish_reason: str | None = None, **what: Any
    ) -> dict[str, Any]:
        choice = {"index": index, **what, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._frame | {"choices": [choice]} | ({"usage": None} if self._include_usage else {})
