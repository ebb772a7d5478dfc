"""Answers as OpenAI's API has them: whole, and as chunks of a stream."""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from promptmill.api.http import ids
from promptmill.api.openai.request_parsing import Question
from promptmill.queue.interactive_wire import usage_of
from promptmill.store.result_lines import openai_choice, openai_usage, shown_logprobs, why_ended
from promptmill.tasks.tools import Offer, ToolCall, Withheld, read_calls, shown_calls
from promptmill.types import Usage


def new_id(raw: bool) -> str:
    return f"{'cmpl' if raw else 'chatcmpl'}-{ids.new_id()}"


def choices_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to one prompt: the first one and those of a request with ``n`` above 1."""
    extras = answer["extras"]
    first = {
        "text": answer["text"], "finish_reason": answer["finish_reason"], "reasoning": extras.get("reasoning"),
        "logprobs": extras.get("logprobs"), "calls": answer.get("calls"),
    }  # fmt: skip
    return [first, *(extras.get("choices") or ())]


def all_choices(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of all answers. The first of an answer is itself."""
    return [each for answer in found for each in (answer, *(answer["extras"].get("choices") or ()))]


def calls_of(offer: Offer, found: list[dict[str, Any]]) -> list[tuple[str, list[ToolCall]]]:
    """Text and calls of each choice: in a child, where a client's schema says what may be called with what."""
    return [read_calls(each["text"], offer) for each in all_choices(found)]


def whole(question: Question, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of a completion: the choices of all prompts, their tokens added up."""
    raw = question.messages is None
    choices = [each for answer in answers for each in choices_of(answer)]
    name = new_id(raw)
    return {
        "id": name,
        "object": "text_completion" if raw else "chat.completion",
        "created": int(time.time()),
        "model": question.model,
        "choices": [openai_choice(index, each, raw, question.offer, name) for index, each in enumerate(choices)],
        "usage": openai_usage(total_usage(answers)),
        # Prompts of one body may have been answered by several workers.
        "system_fingerprint": "+".join(sorted({each["backend"] for each in answers})),
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


@dataclass(slots=True)
class Told:
    """What of one choice the client has seen."""

    characters: int = 0
    #: Log-probabilities that came, and those that wait for the next piece of text.
    tokens: int = 0
    pending: list[dict[str, Any]] = field(default_factory=list)
    #: Characters that the log-probabilities before stand for.
    offset: int = 0
    #: Where tools may be called: text that may be a call is held back.
    withheld: Withheld | None = None


class Chunks:
    """The chunks of one streamed completion. The choices of prompt ``p`` are ``p * n`` to ``p * n + n - 1``."""

    def __init__(self, question: Question, backend: str) -> None:
        """``backend``: what answers, as far as it is known at the first text."""
        self._raw = question.messages is None
        self._question = question
        self._n = int(question.sampling.get("n", 1))
        count = max(1, len(question.texts)) * self._n
        self._told = [Told(withheld=Withheld() if question.offer else None) for _ in range(count)]
        self._frame = {
            "id": new_id(self._raw), "object": "text_completion" if self._raw else "chat.completion.chunk",
            "created": int(time.time()), "model": question.model, "system_fingerprint": backend,
        }  # fmt: skip

    def begin(self) -> Iterator[dict[str, Any]]:
        if not self._raw:
            for index in range(len(self._told)):
                yield self._chunk(index, delta={"role": "assistant", "content": "", "refusal": None})

    def text(self, prompt: int, text: str, logprobs: Any, number: int, backend: str) -> Iterator[dict[str, Any]]:
        """More of answer ``number`` to a prompt; nothing while it may be a call."""
        self._frame["system_fingerprint"] = backend
        index = prompt * self._n + number
        told = self._told[index]
        if logprobs:
            told.pending += logprobs
            told.tokens += len(logprobs)
        if told.withheld is not None:
            text = told.withheld.add(text)
        if text:
            told.characters += len(text)
            yield self._piece(index, text)

    def end(self, prompt: int, answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What of the answers to a prompt has not been told, and why each ended."""
        self._frame["system_fingerprint"] = answer["backend"]
        for number, choice in enumerate(choices_of(answer)):
            yield from self._end_of(prompt * self._n + number, choice)

    def usage(self, answers: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The tokens of all answers, if they were asked for."""
        if self._question.include_usage:
            yield self._frame | {"choices": [], "usage": openai_usage(total_usage(answers))}

    def _end_of(self, index: int, choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
        told, offer = self._told[index], self._question.offer
        read = choice.get("calls")
        content, calls = read or (read_calls(choice["text"], offer) if offer else (choice["text"], []))
        told.pending += (choice.get("logprobs") or [])[told.tokens :]
        if choice.get("reasoning") and not self._raw:
            yield self._chunk(index, delta={"reasoning_content": choice["reasoning"]})
        rest = content[told.characters :]
        if rest or (told.pending and not calls):
            yield self._piece(index, rest)
        if calls:
            shown = shown_calls(calls, f"{self._frame['id']}/{index}")
            delta = {"tool_calls": [{"index": place} | each for place, each in enumerate(shown)]}
            yield self._chunk(index, logprobs=self._logprobs(told), delta=delta)
        nothing: dict[str, Any] = {"text": ""} if self._raw else {"delta": {}}
        yield self._chunk(index, finish_reason=why_ended(choice["finish_reason"], bool(calls)), **nothing)

    def _piece(self, index: int, text: str) -> dict[str, Any]:
        what: dict[str, Any] = {"text": text} if self._raw else {"delta": {"content": text}}
        return self._chunk(index, logprobs=self._logprobs(self._told[index]), **what)

    def _logprobs(self, told: Told) -> dict[str, Any] | None:
        pending, told.pending = told.pending, []
        shown = shown_logprobs(pending, self._raw, told.offset)
        told.offset += sum(len(each["token"]) for each in pending)
        return shown

    def _chunk(
        self, index: int, *, logprobs: Any = None, finish_reason: str | None = None, **what: Any
    ) -> dict[str, Any]:
        choice = {"index": index, **what, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._frame | {"choices": [choice]} | ({"usage": None} if self._question.include_usage else {})
