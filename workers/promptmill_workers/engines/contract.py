"""The contract every engine keeps, and the values it speaks in. ``tests/unit/test_engine_contract.py`` is its judge."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from promptmill.errors import ModelError, RequestError
from promptmill.types import (
    COMMON,
    EngineCounters,
    ErrorClass,
    Extras,
    FinishReason,
    Message,
    Request,
    SamplingParams,
    Sharing,
    Span,
    Usage,
)
from promptmill_workers.model_files import LoadedFiles

#: Names one request inside one engine; its caller chooses it.
RequestKey = int


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is set up. None means: let the engine choose."""

    #: Sequences decoded together.
    slots: int | None = None
    #: Most tokens one request may hold, prompt and answer; at most what the model was trained for.
    context_tokens: int | None = None
    #: Tokens that a job's longest request needs; where none were asked for, one may hold at least so many.
    needed_tokens: int | None = None
    #: KV cells in all, shared by the slots.
    kv_cells: int | None = None
    #: Numbers that the KV cache is kept in: f16, or q8_0 for half the memory at some loss.
    kv_type: str = "f16"
    #: Most tokens of one forward pass.
    batch_tokens: int = 512
    threads: int | None = None
    #: Device asked for: ``cpu``, ``cuda:0``, ``metal``.
    device: str = "cpu"
    #: Leave the CPU's special matrix kernels (AMX, repacked weights) alone: on some machines they end the process.
    plain_kernels: bool = False
    #: Arithmetic that rounds (nearly) alike whatever else is in the batch, at some cost: to compare texts.
    exact: bool = False
    #: Options in the model's name (``echo:token_s=0.01``).
    model_options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was really set up, read from the engine and not from what was asked for."""

    engine: str
    version: str
    model_name: str
    slots: int
    context_tokens: int
    kv_cells: int
    #: ``cpu``, ``cuda:0 (NVIDIA ...)``, ``metal (Apple M3)``.
    device_got: str
    layers: int
    layers_offloaded: int
    #: A batch computes (nearly) what each of its sequences does alone: float32 on a CPU.
    exact: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    #: What else changes its answers: ``chat_template`` (a digest), ``kv_type``, ``flash_attention``.
    settings: dict[str, str] = field(default_factory=dict)
    #: What was loaded, as the host that loaded it found it; None for an engine without files (echo).
    files: LoadedFiles | None = None

    @property
    def fingerprint(self) -> str | None:
        """Which model answers."""
        return self.files.fingerprint if self.files else None

    @property
    def is_overwritten(self) -> bool:
        """Whether the loaded files were written to since: the engine computes with what is written there."""
        return self.files is not None and self.files.are_overwritten

    @property
    def environment(self) -> dict[str, str]:
        """All but the model that changes its answers."""
        return {"name": self.engine, "version": self.version, **self.settings}

    @property
    def backend(self) -> str:
        """The model and the environment in few letters, as OpenAI's ``system_fingerprint``."""
        environment = hashlib.sha256(json.dumps(self.environment, sort_keys=True).encode()).hexdigest()
        return f"fp_{(self.fingerprint or self.engine)[:12]}_{environment[:8]}"


def template_digest(*sources: str | None) -> str:
    """The first digits of a SHA-256 over chat templates; ``none`` where a model has none."""
    texts = [each for each in sources if each]
    return hashlib.sha256("\0".join(texts).encode(errors="replace")).hexdigest()[:12] if texts else "none"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request. Exactly one of ``messages`` (the model's chat template applies) and ``prompt`` (as it is) is set."""

    key: RequestKey
    sampling: SamplingParams
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    #: A client waits for the text: :class:`TokenEvent` s come before the end.
    stream: bool = False
    #: Goes before all that wait and are not urgent.
    urgent: bool = False
    #: Nothing is generated: the log-probability of this text after the prompt is wanted.
    continuation: str | None = None
    #: The continuation is followed by the end of the answer.
    closed: bool = False
    #: What of ``prompt`` the author of a task wrote; None: all of it. See ``types.Message``.
    own: tuple[Span, ...] | None = None
    #: Prefixes of prompts are shared within one owner.
    sharing: Sharing = COMMON

    @classmethod
    def of(cls, request: Request) -> EngineRequest:
        """A request of a job, to be measured or shown."""
        return cls(request.row, request.sampling, request.messages, request.prompt, own=request.own)

    @property
    def is_scored(self) -> bool:
        """Whether texts after the prompt are scored: then it may be empty."""
        return self.continuation is not None or bool(self.sampling.continuations) or self.sampling.scores_choices


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """More text of a request that streams. All of them together are the text of its :class:`Finished`."""

    key: RequestKey
    text: str
    #: Where log-probabilities are asked for: those of the tokens since the last event.
    logprobs: list[dict[str, Any]] | None = None
    #: Which of several answers it belongs to, from 0.
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer. Times are ``time.monotonic()`` seconds of the engine's process; the first token was on the host."""

    key: RequestKey
    text: str
    finish_reason: FinishReason
    usage: Usage
    admitted_at: float
    first_token_at: float
    finished_at: float
    extras: Extras | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that ends without an answer. Token counts and times are there if it was admitted."""

    key: RequestKey
    error_class: ErrorClass
    message: str
    usage: Usage | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None


#: A request has any number of TokenEvents, and then exactly one of the others.
Event = TokenEvent | Finished | Rejected


class GrammarError(RequestError):
    """The grammar cannot be used with this model, or could not be followed."""

    error_class = ErrorClass.GRAMMAR


class Engine(Protocol):
    """Turns requests into events, many at a time. Not thread-safe: one loop owns it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def counters(self) -> EngineCounters: ...

    @property
    def active(self) -> int:
        """Sequences that hold a slot."""
        ...

    @property
    def waiting(self) -> int:
        """Requests added and not yet admitted."""
        ...

    @property
    def kv_cells_used(self) -> int:
        """KV cells that sequences and shared prefixes hold now, of ``info.kv_cells``."""
        ...

    def waiting_keys(self) -> Collection[RequestKey]:
        """The requests added and not yet admitted: those a stopping worker gives back without loss."""
        ...

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Queue any number of requests at any time, urgent ones before the others.

        A request that can never run becomes a ``Rejected`` event.
        """
        ...

    def step(self) -> Sequence[Event]:
        """Fill free slots, run one forward pass, return what ended. Returns at once when there is nothing to do."""
        ...

    def cancel(self, key: RequestKey) -> None:
        """Drop a request, free its slot at once, and say nothing more of it. Unknown keys are ignored."""
        ...

    def render(self, request: EngineRequest) -> str:
        """The prompt as the model sees it: the chat template applied."""
        ...

    def close(self) -> None:
        """Free the device."""
        ...


class EngineWrapper:
    """An engine in front of another one: passes the whole contract on, so that wrappers change what they must."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def counters(self) -> EngineCounters:
        return self._engine.counters

    @property
    def active(self) -> int:
        return self._engine.active

    @property
    def waiting(self) -> int:
        return self._engine.waiting

    @property
    def kv_cells_used(self) -> int:
        return self._engine.kv_cells_used

    def waiting_keys(self) -> Collection[RequestKey]:
        return self._engine.waiting_keys()

    def add(self, requests: Sequence[EngineRequest]) -> None:
        self._engine.add(requests)

    def step(self) -> Sequence[Event]:
        return self._engine.step()

    def cancel(self, key: RequestKey) -> None:
        self._engine.cancel(key)

    def render(self, request: EngineRequest) -> str:
        return self._engine.render(request)

    def close(self) -> None:
        self._engine.close()


def enqueue(waiting: deque[EngineRequest], requests: Sequence[EngineRequest]) -> None:
    """Put ``requests`` into the queue: urgent ones at its head, behind those that are there, the others at its end."""
    waiting.extend(each for each in requests if not each.urgent)
    urgent = [each for each in requests if each.urgent]
    if urgent:
        at = sum(each.urgent for each in waiting)
        waiting.rotate(-at)
        waiting.extendleft(reversed(urgent))
        waiting.rotate(at)


#: Most sequences decoded together: the 256 that llama.cpp was built for, less 8 that hold shared prefixes.
MOST_SLOTS = 248


def refuse_slots(slots: int | None) -> None:
    """Raises ModelError for more sequences than an engine decodes together."""
    if slots is not None and slots > MOST_SLOTS:
        raise ModelError(
            f"at most {MOST_SLOTS} slots, not {slots:,}", hint="16 keep a CPU busy; a GPU is seldom faster above 128."
        )


class TokenCounter(Protocol):
    """The tokeniser of a model without its weights, for preflight before any device is used."""

    @property
    def context_tokens(self) -> int:
        """What the model was trained for."""
        ...

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model has; None where a token is whatever a prompt holds."""
        ...

    def count(self, request: EngineRequest) -> int:
        """Tokens of the prompt as the model sees it. Raises ``promptmill.errors.RequestError``."""
        ...

    def render(self, request: EngineRequest) -> str:
        """The prompt as the model sees it: the chat template applied."""
        ...

    def parts(self, request: EngineRequest) -> list[tuple[str, str]]:
        """The rendered prompt in parts: ``control`` tokens, such as are only ``spelled`` by a text, and ``text``."""
        ...

    def has_two_starts(self, request: EngineRequest) -> bool:
        """Whether the prompt begins with the token of a beginning (BOS) twice."""
        ...
