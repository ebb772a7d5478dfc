"""The object an answer holds. What cannot be read is unparsed: nothing is guessed from words in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NoReturn

from promptmill.scorers import JsonObject, Outcome
from promptmill.types import FinishReason

#: Different answers whose objects are remembered: classifiers give the same few answers over and over.
REMEMBERED = 4096

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"```[\w-]*[ \t]*\r?\n(.*?)```", re.DOTALL)


def classify(text: str | None, finish_reason: str | None, required: tuple[str, ...]) -> tuple[Outcome, JsonObject]:
    """What became of the answer ``text``, and the object it holds (empty unless scored)."""
    found = extract(text or "", required)
    if found is not None:
        return Outcome.SCORED, found
    return (Outcome.TRUNCATED if finish_reason == FinishReason.LENGTH else Outcome.UNPARSED), {}


@lru_cache(maxsize=REMEMBERED)
def extract(text: str, required: tuple[str, ...]) -> JsonObject | None:
    """The object with the keys ``required`` that ``text`` holds, or None.

    Looked for in this order: the whole text, the text without what was thought, fenced blocks (the last that fits),
    the last complete object anywhere.
    """
    answer = without_thinking(text)
    for candidate in (text, answer, *reversed(_FENCE.findall(answer))):
        found = _object(candidate, required)
        if found is not None:
            return found
    return _last(answer, required)


def without_thinking(text: str) -> str:
    """``text`` without its ``<think>`` parts. One that is never closed takes everything after it along."""
    shown = _THINKING.sub("", text)
    # Some chat templates open the thinking in the prompt: then the answer holds only its end.
    _, _, shown = shown.rpartition("</think>")
    return shown.partition("<think>")[0].strip()


def _object(text: str, required: tuple[str, ...]) -> JsonObject | None:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if _fits(value, required) else None


def _last(text: str, required: tuple[str, ...]) -> JsonObject | None:
    last = None
    for last in _objects(text, required):  # noqa: B007 - the last one is what is wanted
        pass
    return last


def _objects(text: str, required: tuple[str, ...]) -> Iterator[JsonObject]:
    """Complete objects with the keys, left to right, none inside another one of them."""
    start = text.find("{")
    while start >= 0:
        end = start + 1
        try:
            value, after = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            pass
        else:
            if _fits(value, required):
                yield value
                end = after
        start = text.find("{", end)


def _fits(value: Any, required: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and all(key in value for key in required)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


#: Python reads NaN and Infinity, which no JSON has.
_DECODER = json.JSONDecoder(parse_constant=_refuse)
