"""The echo engine: answers with its prompt, at a scripted speed. For tests and for measuring everything but a model.

Options in the model's name, ``echo:token_s=0.01,crash_on=WORD``: ``prefill_s`` and ``token_s`` are seconds of real
time per prompt and per output token of a sequence; a prompt that contains the text of ``error_on``, ``crash_on``,
``oom_on`` or ``stall_on`` ends as an error, ends the process by an abort or as the kernel does it for memory, or never
ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from promptmill.core.registry import suggestion
from promptmill.errors import ModelError
from promptmill.types import EngineCounters, ErrorClass, Extras, FinishReason, Message, SamplingParams, Usage
from promptmill_workers.engines.contract import (
    EngineInfo,
    EngineOptions,
    EngineRequest,
    Event,
    Finished,
    Rejected,
    RequestKey,
    TokenEvent,
    enqueue,
)
from promptmill_workers.engines.kv_budget import CPU_SLOTS

#: The context of an engine that has none of its own to respect.
CONTEXT_TOKENS = 131_072

#: Sequences that an echo without delays answers in one step: a step for each slot's worth would measure only itself.
INSTANT_BATCH = 256

#: Log-probability of a token that the prompt does not hold.
UNSURE = -9.0

#: A step sleeps for a token's time, as one of a real engine takes it, so that requests added meanwhile join soon.
#: Within these bounds: a fast echo does not measure its own steps.
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 0.01, 0.05


@dataclass(frozen=True, slots=True)
class Script:
    """The scripted behaviour; times in seconds."""

    prefill_s: float = 0.0
    token_s: float = 0.0
    error_on: str | None = None
    crash_on: str | None = None
    oom_on: str | None = None
    stall_on: str | None = None

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Self:
        """Raises :class:`ModelError` for an unknown option or a time that is no number of seconds."""
        values: dict[str, str | float] = {}
        for name, text in options.items():
            if name not in cls.__dataclass_fields__:
                raise ModelError(f"echo has no option '{name}'", hint=suggestion(name, cls.__dataclass_fields__))
            values[name] = _seconds(name, text) if name.endswith("_s") else text
        return cls(**values)  # type: ignore[arg-type]


def _seconds(name: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise ModelError(f"echo: {name}={text[:40]} is no time", hint="Give seconds, such as 0.01.")
    return found


@dataclass(slots=True)
class Sequence_:
    """A request in a slot."""

    request: EngineRequest
    tokens: list[str]
    prompt_tokens: int
    finish_reason: FinishReason
    admitted_at: float
    first_token_at: float
    finished_at: float
    #: Tokens that somebody who waits for them was told.
    told: int = 0


class EchoEngine:
    """Echoes the last message (or the prompt), cut at stop strings and at ``max_tokens``. A token is a word.

    It is sure of each token. A continuation that the prompt contains is certain to it, any other one has e^-9 a token.
    """

    def __init__(self, model_name: str, options: EngineOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._script = Script.from_options(options.model_options)
        self._slots = options.slots or CPU_SLOTS
        self._context = options.context_tokens or CONTEXT_TOKENS
        self._clock = clock
        self._instant = not (self._script.prefill_s or self._script.token_s)
        pace = self._script.token_s or LONGEST_SLEEP_S
        self._longest_sleep_s = min(max(pace, SHORTEST_SLEEP_S), LONGEST_SLEEP_S)
        self._waiting: deque[EngineRequest] = deque()
        self._active: dict[RequestKey, Sequence_] = {}
        self._sums: Counter[str] = Counter()
        self._peak_active = 0
        self._last_step_end = clock()
        self._info = EngineInfo(
            engine="echo", version="1", model_name=model_name, slots=self._slots, context_tokens=self._context,
            kv_cells=self._context, device_got="cpu", layers=0, layers_offloaded=0,
            exact=True,
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path | None, model_name: str, options: EngineOptions) -> Self:
        return cls(model_name, options)

    @staticmethod
    def check(options: EngineOptions) -> None:
        """Raises ModelError for options that it does not have."""
        Script.from_options(options.model_options)

    @staticmethod
    def token_counter(path: Path | None) -> EchoTokenCounter:
        return EchoTokenCounter()

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def counters(self) -> EngineCounters:
        return EngineCounters(**self._sums, peak_active=self._peak_active)

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_cells_used(self) -> int:
        return sum(each.prompt_tokens + len(each.tokens) for each in self._active.values())

    def waiting_keys(self) -> Collection[RequestKey]:
        return {request.key for request in self._waiting}

    def add(self, requests: Sequence[EngineRequest]) -> None:
        enqueue(self._waiting, requests)

    def cancel(self, key: RequestKey) -> None:
        dropped = self._active.pop(key, None)
        if dropped is not None:
            self._count(decode_tokens=len(dropped.tokens), wasted_tokens=len(dropped.tokens))
        else:
            self._waiting = deque(request for request in self._waiting if request.key != key)

    def render(self, request: EngineRequest) -> str:
        return _render(request)

    def close(self) -> None:
        self._waiting.clear()
        self._active.clear()

    def step(self) -> Sequence[Event]:
        started = self._clock()
        self._count(idle_s=started - self._last_step_end)
        rejected = self._admit(started)
        now = started if self._instant else self._sleep()
        told = self._tell(now)
        finished = self._retire(now)
        self._last_step_end = self._clock()
        if rejected or finished or self._active:
            self._count(steps=1, decode_s=self._last_step_end - started)
        return [*rejected, *told, *finished]

    def _tell(self, now: float) -> list[Event]:
        """The tokens that streaming sequences have made since the last step."""
        events: list[Event] = []
        for each in self._active.values():
            if each.request.stream:
                pace = self._script.token_s
                due = (
                    int((now - each.first_token_at) / pace) + 1 if pace and now < each.finished_at else len(each.tokens)
                )
                if due > each.told:
                    fresh, asked = each.tokens[each.told : due], each.request.sampling
                    logprobs = [_sure(token, asked.top_logprobs) for token in fresh] if asked.logprobs else None
                    events.append(TokenEvent(each.request.key, "".join(fresh), logprobs))
                    each.told = due
        return events

    def _admit(self, now: float) -> list[Event]:
        rejected: list[Event] = []
        room = (max(self._slots, INSTANT_BATCH) if self._instant else self._slots) - len(self._active)
        while self._waiting and room > 0:
            request = self._waiting.popleft()
            outcome = self._begin(request, now)
            if isinstance(outcome, Rejected):
                rejected.append(outcome)
            else:
                self._active[request.key] = outcome
                room -= 1
        active = min(len(self._active), self._slots)
        self._peak_active = max(self._peak_active, active)
        return rejected

    def _begin(self, request: EngineRequest, now: float) -> Sequence_ | Rejected:
        prompt = _render(request)
        self._act_out(prompt)
        prompt_tokens = max(1, len(prompt.split()))
        if self._script.error_on and self._script.error_on in prompt:
            return Rejected(request.key, ErrorClass.INTERNAL, "the echo engine was told to fail this request")
        if prompt_tokens >= self._context:
            message = f"the prompt has {prompt_tokens} tokens, the context {self._context}"
            return Rejected(request.key, ErrorClass.CONTEXT_OVERFLOW, message)
        tokens, reason = _answer(request, self._context - prompt_tokens)
        if reason is FinishReason.STOP and not _fits("".join(tokens), request.sampling):
            return Rejected(request.key, ErrorClass.GRAMMAR, "the echo is not what the grammar asks for")
        prefill_s = prompt_tokens * self._script.prefill_s
        first = now + prefill_s
        self._count(prefill_tokens=prompt_tokens)
        return Sequence_(
            request, tokens, prompt_tokens, reason, now, first, first + max(0, len(tokens) - 1) * self._script.token_s
        )

    def _act_out(self, prompt: str) -> None:
        if self._script.crash_on and self._script.crash_on in prompt:
            os.abort()
        if self._script.oom_on and self._script.oom_on in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._script.stall_on and self._script.stall_on in prompt:
            threading.Event().wait()

    def _sleep(self) -> float:
        """Wait for the next sequence to end, but not for long; returns the time."""
        now = self._clock()
        next_end = min((_ends_at(each) for each in self._active.values()), default=now)
        if next_end > now:
            time.sleep(min(next_end - now, self._longest_sleep_s))
        return self._clock()

    def _retire(self, now: float) -> list[Event]:
        # An echo without delays ends whatever it has admitted.
        over = [each for each in self._active.values() if self._instant or _ends_at(each) <= now]
        events: list[Event] = []
        for sequence in over:
            del self._active[sequence.request.key]
            events.append(self._finish(sequence))
        return events

    def _finish(self, sequence: Sequence_) -> Event:
        key, limit = sequence.request.key, sequence.request.sampling.timeout_s
        usage = Usage(sequence.prompt_tokens, 0, len(sequence.tokens))
        self._count(decode_tokens=len(sequence.tokens))
        if limit is not None and sequence.finished_at - sequence.admitted_at > limit:
            self._count(wasted_tokens=len(sequence.tokens))
            ended = sequence.admitted_at + limit
            return Rejected(
                key, ErrorClass.TIMEOUT, f"no answer within {limit:g} s", usage,
                sequence.admitted_at, min(sequence.first_token_at, ended), ended,
            )  # fmt: skip
        return Finished(
            key, "".join(sequence.tokens), sequence.finish_reason, usage, sequence.admitted_at,
            sequence.first_token_at, sequence.finished_at, _extras(sequence),
        )  # fmt: skip

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._sums[name] += value  # type: ignore[assignment]


def _ends_at(sequence: Sequence_) -> float:
    limit = sequence.request.sampling.timeout_s
    return sequence.finished_at if limit is None else min(sequence.finished_at, sequence.admitted_at + limit)


def _fits(text: str, sampling: SamplingParams) -> bool:
    """Whether the echo is what was asked for: an echo cannot be bound."""
    if sampling.json_schema is not None:
        from jsonschema.validators import validator_for

        schema = json.loads(sampling.json_schema)
        try:
            return bool(validator_for(schema)(schema).is_valid(json.loads(text)))
        except Exception:
            # No JSON, or a reference that leads nowhere.
            return False
    return sampling.regex is None or re.fullmatch(sampling.regex, text) is not None


def _extras(sequence: Sequence_) -> Extras | None:
    request = sequence.request
    if request.continuation is not None:
        count = max(1, len(request.continuation.split()))
        known = request.continuation.strip() in _spoken(request.messages, request.prompt)
        score = {
            "text": request.continuation, "logprob": 0.0 if known else UNSURE * count, "tokens": count, "greedy": known,
        }  # fmt: skip
        return Extras(continuations=[score])
    if request.sampling.embedding:
        digest = hashlib.sha256((request.prompt or "").encode(errors="replace")).digest()
        length = sum(byte * byte for byte in digest) ** 0.5
        return Extras(embedding=[byte / length for byte in digest])
    if request.sampling.logprobs:
        return Extras(logprobs=[_sure(token, request.sampling.top_logprobs) for token in sequence.tokens])
    return None


def _sure(token: str, top: int) -> dict[str, Any]:
    entry = {"token": token, "logprob": 0.0, "bytes": list(token.encode(errors="replace"))}
    return entry | {"top_logprobs": [entry] if top else []}


class EchoTokenCounter:
    """Counts words, as the echo engine does."""

    @property
    def context_tokens(self) -> int:
        return CONTEXT_TOKENS

    @property
    def vocabulary(self) -> int | None:
        return None

    def count(self, request: EngineRequest) -> int:
        return max(1, len(_render(request).split()))

    def render(self, request: EngineRequest) -> str:
        return _render(request)

    def parts(self, request: EngineRequest) -> list[tuple[str, str]]:
        return [(_render(request), "text")]

    def has_two_starts(self, request: EngineRequest) -> bool:
        return False


def _render(request: EngineRequest) -> str:
    if request.messages is None:
        return request.prompt or ""
    tools = f"tools: {request.sampling.tools}\n" if request.sampling.tools else ""
    return tools + "".join(f"{each.role}: {each.content or each.extra}\n" for each in request.messages)


def _spoken(messages: tuple[Message, ...] | None, prompt: str | None) -> str:
    return messages[-1].content if messages else prompt or ""


def _answer(request: EngineRequest, room: int) -> tuple[list[str], FinishReason]:
    """The answer's tokens: words with the white space before them."""
    if request.continuation is not None or request.sampling.embedding:
        return [], FinishReason.STOP
    text = _spoken(request.messages, request.prompt)
    cuts = [at for stop in request.sampling.stop if (at := text.find(stop)) >= 0]
    text = text[: min(cuts)] if cuts else text
    words = text.split(" ")
    tokens = [word if index == 0 else f" {word}" for index, word in enumerate(words)] if text else []
    limit = min(request.sampling.max_tokens, room)
    if len(tokens) > limit:
        return tokens[:limit], FinishReason.LENGTH
    return tokens, FinishReason.STOP
