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
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from promptmill.core.registry import suggestion
from promptmill.errors import ModelError, RequestError
from promptmill.tasks.sampling import PromptTooLong
from promptmill.types import ErrorClass, Extras, FinishReason, Message, SamplingParams
from promptmill_workers.engines.contract import EngineInfo, EngineOptions, EngineRequest, GrammarError
from promptmill_workers.engines.kv_budget import CPU_SLOTS
from promptmill_workers.engines.scheduler import Admission, EngineSequence, Pass

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


class EchoError(RequestError):
    """The script says that this request fails."""

    error_class = ErrorClass.INTERNAL


class EchoAnswer:
    """Words of which the first ``count`` were said."""

    __slots__ = ("_request", "_shown", "_shown_logprobs", "count", "reason", "reasoning_tokens", "tokens")

    def __init__(self, request: EngineRequest, room: int) -> None:
        """``room``: most tokens."""
        self._request = request
        self.tokens, self.reason = _answer(request, room)
        self.count = self.reasoning_tokens = self._shown = self._shown_logprobs = 0

    def fresh(self) -> str:
        shown, self._shown = self._shown, self.count
        return "".join(self.tokens[shown : self.count])

    def fresh_logprobs(self) -> list[dict[str, Any]] | None:
        shown, self._shown_logprobs = self._shown_logprobs, self.count
        return _logprobs(self._request.sampling, self.tokens[shown : self.count])

    def finish(self, reason: FinishReason) -> tuple[str, FinishReason, Extras | None]:
        return "".join(self.tokens), reason, _extras(self._request, self.tokens)


@dataclass(slots=True, eq=False)
class EchoSequence(EngineSequence):
    """A request, and when its answer begins and is over; never, where its time-out comes first."""

    prompt: str
    answer: EchoAnswer = field(init=False)
    first_at: float = field(default=0.0, init=False)
    over_at: float = field(default=0.0, init=False)
    #: When it is over or its time-out comes.
    ends_at: float = field(default=0.0, init=False)


class EchoBackend:
    """Echoes the last message (or the prompt), cut at stop strings and at ``max_tokens``. A token is a word.

    It is sure of each token. A continuation that the prompt contains is certain to it, any other one has e^-9 a token.
    """

    def __init__(self, model_name: str, options: EngineOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._script = Script.from_options(options.model_options)
        self._context = options.context_tokens or max(CONTEXT_TOKENS, options.needed_tokens or 0)
        self._clock = clock
        self._instant = not (self._script.prefill_s or self._script.token_s)
        pace = self._script.token_s or LONGEST_SLEEP_S
        self._longest_sleep_s = min(max(pace, SHORTEST_SLEEP_S), LONGEST_SLEEP_S)
        slots = options.slots or CPU_SLOTS
        self.most_running = max(slots, INSTANT_BATCH) if self._instant else slots
        self._cells = self._prefilled = 0
        self.info = EngineInfo(
            engine="echo", version="1", model_name=model_name, slots=slots, context_tokens=self._context,
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
    def kv_cells_used(self) -> int:
        """What a model would hold: an echo has no cache."""
        return min(self._cells, self._context)

    def render(self, request: EngineRequest) -> str:
        return _render(request)

    def close(self) -> None:
        """It holds nothing."""

    def prepare(self, request: EngineRequest) -> EchoSequence:
        prompt = _render(request)
        return EchoSequence(request, max(1, len(prompt.split())), prompt)

    def plan(self, waiting: Sequence[EchoSequence]) -> Iterable[EchoSequence]:
        return waiting

    def admit(self, sequence: EchoSequence, waiting: Collection[EchoSequence]) -> Admission:
        self._act_out(sequence.prompt)
        room = self._context - sequence.prompt_tokens
        if room < 1:
            raise PromptTooLong(f"the prompt has {sequence.prompt_tokens} tokens, the context {self._context}")
        answer, sampling = EchoAnswer(sequence.request, room), sequence.request.sampling
        if (
            sampling.is_constrained
            and answer.reason is FinishReason.STOP
            and not _fits("".join(answer.tokens), sampling)
        ):
            raise GrammarError("the echo is not what the grammar asks for")
        sequence.answer = answer
        sequence.first_at = sequence.admitted_at + sequence.prompt_tokens * self._script.prefill_s
        sequence.over_at = sequence.first_at + max(0, len(answer.tokens) - 1) * self._script.token_s
        limit = sampling.timeout_s
        sequence.ends_at = sequence.over_at
        if limit is not None and sequence.over_at - sequence.admitted_at > limit:
            sequence.over_at, sequence.ends_at = math.inf, sequence.admitted_at + limit
        self._prefilled += sequence.prompt_tokens
        self._cells += sequence.prompt_tokens + len(answer.tokens)
        return Admission.ADMITTED

    def _act_out(self, prompt: str) -> None:
        if self._script.crash_on and self._script.crash_on in prompt:
            os.abort()
        if self._script.oom_on and self._script.oom_on in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._script.stall_on and self._script.stall_on in prompt:
            threading.Event().wait()
        if self._script.error_on and self._script.error_on in prompt:
            raise EchoError("the echo engine was told to fail this request")

    def free(self, sequence: EchoSequence) -> None:
        self._cells -= sequence.prompt_tokens + len(sequence.answer.tokens)

    def forward(self, running: Collection[EchoSequence], waiting: Collection[EchoSequence]) -> Pass[EchoSequence]:
        if not running:
            return Pass()
        started = self._clock()
        now = started if self._instant else self._sleep(running)
        done: Pass[EchoSequence] = Pass(steps=1, prefill_tokens=self._prefilled)
        self._prefilled = 0
        for each in running:
            answer, known = each.answer, each.answer.count
            is_over = each.over_at <= now
            answer.count = len(answer.tokens) if is_over else self._said(each, now)
            done.decode_tokens += answer.count - known
            if is_over:
                each.first_token_at, each.finished_at = each.first_at, each.over_at
                done.outcomes.append((each, answer.reason))
            elif answer.count > known:
                each.first_token_at = each.first_at
                done.outcomes.append((each, None))
        done.decode_s = self._clock() - started
        return done

    def _said(self, sequence: EchoSequence, now: float) -> int:
        """Tokens until now of a sequence that is not over."""
        pace = self._script.token_s
        said = int((now - sequence.first_at) / pace) + 1 if pace and now >= sequence.first_at else 0
        return min(said, len(sequence.answer.tokens))

    def _sleep(self, running: Iterable[EchoSequence]) -> float:
        """Wait for the next sequence to end, but not for long; returns the time."""
        now = self._clock()
        next_end = min(each.ends_at for each in running)
        if next_end > now:
            time.sleep(min(next_end - now, self._longest_sleep_s))
        return self._clock()


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


def _extras(request: EngineRequest, tokens: list[str]) -> Extras | None:
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
    logprobs = _logprobs(request.sampling, tokens)
    return None if logprobs is None else Extras(logprobs=logprobs)


def _logprobs(sampling: SamplingParams, tokens: list[str]) -> list[dict[str, Any]] | None:
    return [_sure(token, sampling.top_logprobs) for token in tokens] if sampling.logprobs else None


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
