"""The queue of an engine: which requests run, from when until when, and what they end with. Knows no tensors.

The life of a request, top to bottom in :meth:`Scheduler.step`:

1. ``add`` puts it among the incoming ones; urgent ones go before the others.
2. **admit**. ``Backend.prepare`` turns it into a sequence of tokens, and ``Backend.plan`` orders the sequences that
   wait. ``Backend.admit`` gives the next one a slot; where the KV cache is full, it waits.
3. **forward**. ``Backend.forward`` runs one pass over the running sequences, step after step. It says which of them
   got tokens, and which ended.
4. **retire**. A sequence that streams tells its new text as a ``TokenEvent``. One that ended becomes ``Finished``; one
   that failed or is over its time becomes ``Rejected``. ``Backend.free`` takes its slot.

Two things leave this path. ``cancel`` drops a request wherever it is. A pass that found no memory makes the youngest
sequence give up its slot: it goes back to the head of those that wait, and starts again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from promptmill.errors import RequestError
from promptmill.types import EngineCounters, ErrorClass, Extras, FinishReason, Usage
from promptmill_workers.engines.contract import (
    EngineInfo,
    EngineRequest,
    Event,
    Finished,
    Rejected,
    RequestKey,
    TokenEvent,
    enqueue,
)

#: Requests that are turned into tokens in one step while sequences run: they must not wait for a long list.
TOKENISED_PER_STEP = 64

#: Sequences behind one that has to wait for its prefix that may be admitted before it, for each slot.
LOOKED_AT_PER_SLOT = 4


class BegunAnswer(Protocol):
    """What is generated for a sequence."""

    @property
    def count(self) -> int:
        """Tokens."""
        ...

    @property
    def reasoning_tokens(self) -> int: ...

    def fresh(self) -> str:
        """Text that was not told yet, for a request that streams."""
        ...

    def fresh_logprobs(self) -> list[dict[str, Any]] | None: ...

    def finish(self, reason: FinishReason) -> tuple[str, FinishReason, Extras | None]:
        """The text, why it ended, and what else was asked for."""
        ...


@dataclass(slots=True)
class Computed:
    """The answer to a request for which no token is generated: a score or a vector."""

    text: str = ""
    extras: Extras | None = None
    count: int = field(default=0, init=False)
    reasoning_tokens: int = field(default=0, init=False)

    def fresh(self) -> str:
        return ""

    def fresh_logprobs(self) -> list[dict[str, Any]] | None:
        return None

    def finish(self, reason: FinishReason) -> tuple[str, FinishReason, Extras | None]:
        return self.text, reason, self.extras


@dataclass(slots=True, eq=False)
class EngineSequence:
    """A request with its prompt, and with its answer once it runs. Backends add what they compute with."""

    request: EngineRequest
    prompt_tokens: int
    #: Prompt tokens that were not computed for this request.
    cached: int = field(default=0, init=False)
    #: Set by ``Backend.admit``.
    answer: BegunAnswer = field(init=False)
    admitted_at: float = field(default=0.0, init=False)
    #: When it happened; the scheduler's clock says it where the backend does not.
    first_token_at: float | None = field(default=None, init=False)
    finished_at: float | None = field(default=None, init=False)

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.cached, self.answer.count, self.answer.reasoning_tokens)


S = TypeVar("S", bound=EngineSequence)


class Admission(Enum):
    """What ``Backend.admit`` did."""

    ADMITTED = auto()
    #: Not now; those behind it may go first.
    LATER = auto()
    #: No memory. Those behind it may not go first, or a sequence that needs much would never run.
    FULL = auto()


@dataclass(slots=True)
class Pass(Generic[S]):
    """What a forward pass did. Times in seconds; what a step takes beside them is counted as overhead."""

    #: Forward passes of the model: 0 when there was nothing to compute.
    steps: int = 0
    prefill_tokens: int = 0
    #: Tokens of answers.
    decode_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    #: The sequences that got tokens, and why they ended with them. None: they go on.
    outcomes: list[tuple[S, FinishReason | RequestError | None]] = field(default_factory=list)
    #: Nothing was computed: a running sequence has to give up its memory.
    no_room: bool = False


class Backend(Protocol[S]):
    """What computes. Called by one scheduler, in one thread."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def most_running(self) -> int:
        """Sequences that run at one time."""
        ...

    @property
    def kv_cells_used(self) -> int: ...

    def prepare(self, request: EngineRequest) -> S:
        """Tokenise the prompt. Raises RequestError."""
        ...

    def plan(self, waiting: Sequence[S]) -> Iterable[S]:
        """The same sequences in the order in which to admit them, urgent ones aside. Called when there are new ones."""
        ...

    def admit(self, sequence: S, waiting: Collection[S]) -> Admission:
        """Give a sequence a slot. Called only while fewer than ``most_running`` have one. Raises RequestError.

        ``waiting``: all that have none, this one among them.
        """
        ...

    def forward(self, running: Collection[S], waiting: Collection[S]) -> Pass[S]:
        """One pass over the running sequences. Returns at once when there is nothing to compute."""
        ...

    def free(self, sequence: S) -> None:
        """Free the slot of a running sequence."""
        ...

    def render(self, request: EngineRequest) -> str:
        """The prompt as the model sees it. Raises RequestError."""
        ...

    def close(self) -> None:
        """Free the device."""
        ...


class Scheduler(Generic[S]):
    """The engine of the contract over a backend."""

    def __init__(self, backend: Backend[S], clock: Callable[[], float] = time.monotonic) -> None:
        self.backend = backend
        self._info = backend.info
        self._clock = clock
        self._incoming: deque[EngineRequest] = deque()
        self._waiting: deque[S] = deque()
        self._planned = True
        self._running: dict[RequestKey, S] = {}
        #: No request is admitted between a full KV cache and the next sequence that ends.
        self._crowded = False
        self._rejected: list[Event] = []
        self._sums: Counter[str] = Counter()
        self._peak_active = self._peak_cells = 0
        self._last_end = clock()

    # --- the contract ------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def counters(self) -> EngineCounters:
        return EngineCounters(**self._sums, peak_active=self._peak_active, peak_kv_cells=self._peak_cells)

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._incoming) + len(self._waiting)

    @property
    def kv_cells_used(self) -> int:
        return self.backend.kv_cells_used

    def waiting_keys(self) -> Collection[RequestKey]:
        return {each.key for each in self._incoming} | {each.request.key for each in self._waiting}

    def add(self, requests: Sequence[EngineRequest]) -> None:
        enqueue(self._incoming, requests)

    def cancel(self, key: RequestKey) -> None:
        if (sequence := self._running.get(key)) is not None:
            self._drop(sequence)
            return
        self._incoming = deque(each for each in self._incoming if each.key != key)
        self._waiting = deque(each for each in self._waiting if each.request.key != key)
        self._rejected = [each for each in self._rejected if each.key != key]

    def render(self, request: EngineRequest) -> str:
        return self.backend.render(request)

    def close(self) -> None:
        self.backend.close()

    def step(self) -> Sequence[Event]:
        started = self._clock()
        self._count(idle_s=started - self._last_end)
        self._admit(started)
        # After the slots were filled: one that ended in the last step has not starved.
        is_starved = bool(self.waiting) and self.active < self._info.slots
        done = self.backend.forward(self._running.values(), self._waiting)
        events = self._retire(done, self._clock())
        self._account(started, is_starved, done)
        return events

    # --- admit -------------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        self._tokenise()
        free = self.backend.most_running - len(self._running)
        if not self._waiting or free <= 0 or (self._crowded and self._running):
            return
        if not self._planned:
            planned = self.backend.plan(self._waiting)
            self._waiting = deque(sorted(planned, key=lambda each: not each.request.urgent))
            self._planned = True
        for sequence in list(islice(self._waiting, free + LOOKED_AT_PER_SLOT * self.backend.most_running)):
            if self._start(sequence, now) is Admission.FULL or len(self._running) >= self.backend.most_running:
                break
        self._peak_active = max(self._peak_active, min(len(self._running), self._info.slots))
        self._peak_cells = max(self._peak_cells, self.kv_cells_used)

    def _tokenise(self) -> None:
        """Prepare some of what came in; all of it when nothing runs."""
        quota = TOKENISED_PER_STEP if self._running else len(self._incoming)
        for _ in range(min(quota, len(self._incoming))):
            request = self._incoming.popleft()
            try:
                self._waiting.append(self.backend.prepare(request))
            except RequestError as problem:
                self._rejected.append(Rejected(request.key, _class_of(problem), problem.message))
            else:
                self._planned = False

    def _start(self, sequence: S, now: float) -> Admission:
        """Give a waiting sequence a slot, if it may have one."""
        request = sequence.request
        sequence.admitted_at = now
        try:
            admission = self.backend.admit(sequence, self._waiting)
        except RequestError as problem:
            self._waiting.remove(sequence)
            self._rejected.append(Rejected(request.key, _class_of(problem), problem.message))
            return Admission.LATER
        if admission is Admission.ADMITTED:
            self._waiting.remove(sequence)
            self._running[request.key] = sequence
        return admission

    # --- retire ------------------------------------------------------------------------------------------------------

    def _retire(self, done: Pass[S], now: float) -> list[Event]:
        if done.no_room:
            self._preempt()
        events, self._rejected = self._rejected, []
        for sequence, outcome in done.outcomes:
            if isinstance(outcome, RequestError):
                events.append(self._failed(sequence, _class_of(outcome), outcome.message, now))
                continue
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            if sequence.request.stream and (text := sequence.answer.fresh()):
                events.append(TokenEvent(sequence.request.key, text, sequence.answer.fresh_logprobs()))
            if outcome is not None:
                events.append(self._finished(sequence, outcome, now))
        for sequence in [each for each in self._running.values() if _is_late(each, now)]:
            message = f"no answer within {sequence.request.sampling.timeout_s:g} s"
            events.append(self._failed(sequence, ErrorClass.TIMEOUT, message, now))
        return events

    def _finished(self, sequence: S, reason: FinishReason, now: float) -> Finished:
        self._release(sequence)
        text, reason, extras = sequence.answer.finish(reason)
        first = now if sequence.first_token_at is None else sequence.first_token_at
        end = now if sequence.finished_at is None else sequence.finished_at
        return Finished(
            sequence.request.key, text, reason, sequence.usage, sequence.admitted_at, first, end, extras
        )  # fmt: skip

    def _failed(self, sequence: S, error_class: ErrorClass, message: str, now: float) -> Rejected:
        """The request ends without an answer, after it had a slot."""
        self._drop(sequence)
        return Rejected(
            sequence.request.key, error_class, message, sequence.usage, sequence.admitted_at, sequence.first_token_at,
            now,
        )  # fmt: skip

    def _preempt(self) -> None:
        """Let the youngest sequence start again later."""
        # A part of one that streams is known already.
        running = reversed(self._running.values())
        youngest = max(running, key=lambda each: (not each.request.stream, each.admitted_at))
        self._drop(youngest)
        self._crowded = True
        if self._running:
            self._waiting.appendleft(self.backend.prepare(youngest.request))
            return
        message = f"the KV cache of {self._info.kv_cells:,} cells has no room for this request"
        self._rejected.append(Rejected(youngest.request.key, ErrorClass.OUT_OF_MEMORY, message))

    def _drop(self, sequence: S) -> None:
        """Free a slot whose tokens are of no use."""
        self._release(sequence)
        self._count(wasted_tokens=sequence.usage.output_tokens)

    def _release(self, sequence: S) -> None:
        self._crowded = False
        del self._running[sequence.request.key]
        self.backend.free(sequence)

    # --- what it did -------------------------------------------------------------------------------------------------

    def _account(self, started: float, is_starved: bool, done: Pass[S]) -> None:
        """Close the step's books: what was neither prefill nor decode is overhead."""
        self._last_end = self._clock()
        spent = self._last_end - started
        self._count(
            steps=done.steps,
            prefill_s=done.prefill_s,
            decode_s=done.decode_s,
            overhead_s=max(0.0, spent - done.prefill_s - done.decode_s),
            prefill_tokens=done.prefill_tokens,
            decode_tokens=done.decode_tokens,
            starved_s=spent if is_starved else 0.0,
        )

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._sums[name] += value  # type: ignore[assignment]


def _class_of(problem: RequestError) -> ErrorClass:
    found: ErrorClass = getattr(problem, "error_class", ErrorClass.INVALID_REQUEST)
    return found


def _is_late(sequence: EngineSequence, now: float) -> bool:
    limit = sequence.request.sampling.timeout_s
    return limit is not None and now - sequence.admitted_at >= limit
