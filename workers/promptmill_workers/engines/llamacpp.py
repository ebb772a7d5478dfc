"""llama.cpp with continuous batching: each step decodes one token of every running sequence and the next prompt tokens.

Three verbs make a step: admit waiting requests to free slots, run one batch forward, retire what has ended.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Self

import llama_cpp

from promptmill.errors import ModelError, RequestError
from promptmill.types import EngineCounters, ErrorClass, FinishReason, Usage
from promptmill_workers.engines.contract import (
    EngineInfo,
    EngineOptions,
    EngineRequest,
    Event,
    Finished,
    Rejected,
    RequestKey,
)
from promptmill_workers.engines.llama_binding import MOST_SEQUENCES, NO_ROOM, Context, Model, Shape, Tokens, shape_of
from promptmill_workers.engines.llama_prefixes import Prefix, Prefixes
from promptmill_workers.engines.llama_text import AnswerText, LlamaTokenCounter, PromptReader, PromptTooLong
from promptmill_workers.prefix_plan import LEAST_TOKENS, common_length, plan_nested

#: Context of a request when nobody asked for another one.
CONTEXT_TOKENS = 4096

#: KV cells that a slot is given on average.
CELLS_PER_SLOT = 1024

#: Shared prefixes that are kept at once. Each takes a sequence number and its cells.
PREFIXES = 8

#: Requests that are turned into tokens in one step while sequences run: they must not wait for a long list.
TOKENISED_PER_STEP = 64

#: Requests behind one whose prefix is being computed that may be admitted before it, for each slot.
LOOKED_AT_PER_SLOT = 4


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that is tokenised and has no slot. ``shared`` tokens of its prompt are planned to be computed once."""

    request: EngineRequest
    prompt: Tokens
    limit: int
    shared: int = 0


@dataclass(slots=True, eq=False)
class Running:
    """A request in a slot. ``done`` of its prompt tokens are in the KV cache, the first ``shared`` of them a prefix's.

    ``cached`` of them were not computed for this request.
    """

    slot: int
    waiting: Waiting
    prefix: Prefix | None
    shared: int
    cached: int
    done: int
    admitted_at: float
    text: AnswerText
    first_token_at: float | None = None
    count: int = 0
    last: int = -1
    #: Batch index of the output that this step samples; -1 when it asks for none.
    output: int = -1

    @property
    def request(self) -> EngineRequest:
        return self.waiting.request

    @property
    def in_prefill(self) -> bool:
        return self.done < len(self.waiting.prompt)

    @property
    def cells(self) -> int:
        """KV cells that are set aside for it. A prefix's are the prefix's; a neighbour's become its when that ends."""
        return _cells(self.waiting, self.shared)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.waiting.prompt), self.cached, self.count)


@dataclass(slots=True)
class Pass:
    """What one forward pass computed, in tokens, and how long it took."""

    decoded: int = 0
    prefilled: int = 0
    seconds: float = 0.0
    #: Pieces of prompts and prefixes that were in the batch.
    pieces: list[tuple[Prefix | Running, int]] = field(default_factory=list)


class LlamaCppEngine:
    """The engine of the contract over llama.cpp's low-level bindings."""

    def __init__(self, model: Model, name: str, options: EngineOptions) -> None:
        if options.slots + PREFIXES > MOST_SEQUENCES:
            raise ModelError(f"llama.cpp runs at most {MOST_SEQUENCES - PREFIXES} slots, not {options.slots}")
        self._model = model
        self._vocabulary = model.vocabulary
        self._prompts = PromptReader(model)
        self._context_tokens = min(model.context_trained, options.context_tokens or CONTEXT_TOKENS)
        cells = options.kv_cells or max(self._context_tokens, options.slots * min(self._context_tokens, CELLS_PER_SLOT))
        self._batch_tokens = max(options.batch_tokens, options.slots + PREFIXES)
        self._context = Context(
            model, cells=max(cells, self._context_tokens), batch=self._batch_tokens, slots=options.slots,
            spare=PREFIXES, threads=options.threads or _cores(), exact=options.exact,
        )  # fmt: skip
        self._context.warm_up()
        self._incoming: deque[EngineRequest] = deque()
        self._waiting: deque[Waiting] = deque()
        self._running: dict[int, Running] = {}
        self._free = list(range(options.slots))[::-1]
        self._prefixes = Prefixes(self._context, range(options.slots, options.slots + PREFIXES))
        self._planned = True
        #: Nobody is admitted between a full KV cache and the next request that ends.
        self._crowded = False
        self._sampled = 0
        self._rejected: list[Event] = []
        self._sums: Counter[str] = Counter()
        self._peak_active = self._peak_cells = 0
        self._last_end = time.monotonic()
        self._info = EngineInfo(
            engine="llamacpp", version=str(llama_cpp.__version__), model_name=name, slots=options.slots,
            context_tokens=self._context_tokens, kv_cells=self._context.cells, device_got=model.device_name(),
            layers=model.layers, layers_offloaded=model.offloaded,
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path | None, model_name: str, options: EngineOptions) -> Self:
        """Raises ModelError or DeviceError."""
        assert path is not None
        model = Model(path, gpu=options.device != "cpu", plain_kernels=options.plain_kernels)
        return cls(model, model_name, options)

    @staticmethod
    def token_counter(path: Path | None) -> LlamaTokenCounter:
        """Raises ModelError."""
        assert path is not None
        return LlamaTokenCounter(Model(path, vocab_only=True))

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

    def waiting_keys(self) -> Collection[RequestKey]:
        return {each.key for each in self._incoming} | {each.request.key for each in self._waiting}

    def add(self, requests: Sequence[EngineRequest]) -> None:
        self._incoming.extend(requests)

    def cancel(self, key: RequestKey) -> None:
        for running in list(self._running.values()):
            if running.request.key == key:
                self._release(running)
                self._count(wasted_tokens=running.count)
                return
        self._incoming = deque(each for each in self._incoming if each.key != key)
        self._waiting = deque(each for each in self._waiting if each.request.key != key)
        self._rejected = [each for each in self._rejected if each.key != key]

    def render(self, request: EngineRequest) -> str:
        return self._prompts.render(request)

    def close(self) -> None:
        self._context.close()
        self._model.close()

    def step(self) -> Sequence[Event]:
        started = time.monotonic()
        self._count(idle_s=started - self._last_end)
        self._sampled = 0
        self._admit(started)
        # After the slots were filled: a slot that ended in the last step has not starved.
        starved = bool(self._free and self.waiting)
        done = self._forward()
        events = self._retire()
        self._account(started, starved, done)
        return events

    # --- admit -------------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        self._tokenise()
        if self._crowded and self._running:
            return
        if self._free and not self._planned:
            self._plan()
        looked_at = len(self._free) + LOOKED_AT_PER_SLOT * self._info.slots
        for waiting in list(islice(self._waiting, looked_at)):
            if not self._free:
                return
            prefix, shared, ready = self._prefix_for(waiting)
            if not ready:
                continue  # Its prefix is being computed; those behind it may go first.
            if not self._make_room(_cells(waiting, shared if prefix else 0), keep=prefix):
                return  # Those behind it may not, or a request that needs many cells would never run.
            self._waiting.remove(waiting)
            self._begin(waiting, prefix, shared, now)

    def _tokenise(self) -> None:
        """Turn some of what came in into tokens; all of it when nothing runs."""
        quota = TOKENISED_PER_STEP if self._running else len(self._incoming)
        for _ in range(min(quota, len(self._incoming))):
            request = self._incoming.popleft()
            try:
                prompt = self._prompts.fitting_tokens(request, self._context_tokens)
            except PromptTooLong as problem:
                self._rejected.append(Rejected(request.key, ErrorClass.CONTEXT_OVERFLOW, problem.message))
                continue
            except RequestError as problem:
                self._rejected.append(Rejected(request.key, ErrorClass.INVALID_REQUEST, problem.message))
                continue
            room = self._context_tokens - len(prompt)
            self._waiting.append(Waiting(request, prompt, min(request.sampling.max_tokens, room)))
            self._planned = False

    def _plan(self) -> None:
        """Decide which prefixes to share, and bring requests that share one together."""
        self._planned = True
        if not self._model.has_cells:
            return
        waiting = list(self._waiting)
        nested = plan_nested([each.prompt for each in waiting])
        for each, shared in zip(waiting, nested.shared, strict=True):
            each.shared = shared
        self._waiting = deque(waiting[index] for index in nested.order)

    def _prefix_for(self, waiting: Waiting) -> tuple[Prefix | None, int, bool]:
        """The prefix to use, how many of its tokens, and whether these are in the KV cache.

        The best that is here, or a new one when the plan wants clearly more.
        """
        prefix, shared = self._prefixes.longest(waiting.prompt[:-1])
        if waiting.shared - shared >= LEAST_TOKENS:
            if prefix is not None and prefix.done < shared:
                return prefix, shared, False  # A new one will continue this one.
            made = self._new_prefix(waiting.prompt[: waiting.shared])
            if made is not None:
                prefix, shared = made, waiting.shared
        return prefix, shared, prefix is None or prefix.done >= shared

    def _new_prefix(self, tokens: Tokens) -> Prefix | None:
        """Start a prefix with what others have computed of it; None when there is no sequence or no room for it."""
        if self._prefixes.full and not self._prefixes.forget_one(self._prompts_waiting()):
            return None
        if not self._make_room(len(tokens)):
            return None
        base, shared = self._prefixes.longest(tokens)
        done = min(base.done, shared) if base else 0
        neighbour, common = self._neighbour(tokens)
        if neighbour is not None and common > done:
            return self._prefixes.begin(tokens, neighbour.slot, common)
        return self._prefixes.begin(tokens, base.sequence if base else 0, done)

    def _neighbour(self, tokens: Tokens) -> tuple[Running | None, int]:
        """The running sequence that has computed most of ``tokens``, and how many."""
        best, shared = None, LEAST_TOKENS - 1
        for running in self._running.values() if self._model.has_cells else ():
            length = min(running.done, common_length(running.waiting.prompt, tokens))
            if length > shared:
                best, shared = running, length
        return best, shared if best else 0

    def _begin(self, waiting: Waiting, prefix: Prefix | None, shared: int, now: float) -> None:
        """Give the request a slot."""
        slot = self._slot_for(shape_of(waiting.request.sampling))
        if prefix is not None:
            cached, done = self._prefixes.use(prefix, slot, shared, now), shared
        else:
            cached = done = self._share_with_neighbour(slot, waiting.prompt[:-1])
        sampling = waiting.request.sampling
        seed = sampling.seed if sampling.seed is not None else random.getrandbits(31)
        self._context.set_sampling(slot, shape_of(sampling), seed)
        self._running[slot] = Running(slot, waiting, prefix, shared, cached, done, now, AnswerText(sampling.stop))

    def _share_with_neighbour(self, slot: int, head: Tokens) -> int:
        """Take over what a running sequence has computed of ``head``; returns how many tokens."""
        neighbour, shared = self._neighbour(head)
        if neighbour is not None:
            self._context.share(neighbour.slot, slot, shared)
        return shared

    def _slot_for(self, shape: Shape) -> int:
        """A free slot, best one whose sampler has the same shape: another shape costs a new graph."""
        slot = next((each for each in reversed(self._free) if self._context.shape(each) == shape), self._free[-1])
        self._free.remove(slot)
        return slot

    def _make_room(self, cells: int, keep: Prefix | None = None) -> bool:
        """Whether ``cells`` are free, after forgetting prefixes that nobody uses if need be."""
        while self._used_cells() + cells > self._context.cells:
            if not self._prefixes.forget_one(self._prompts_waiting(), keep):
                return False
        return True

    def _used_cells(self) -> int:
        return self._prefixes.cells + sum(each.cells for each in self._running.values())

    def _prompts_waiting(self) -> Collection[Tokens]:
        return [each.prompt for each in self._waiting]

    # --- forward -----------------------------------------------------------------------------------------------------

    def _forward(self) -> Pass:
        """One batch: a token of every decoding sequence, then prompt tokens as they fit."""
        done = Pass()
        self._context.clear_batch()
        self._put_decodes(done)
        self._put_prompts(done)
        if done.decoded + done.prefilled == 0:
            return done
        started = time.monotonic()
        code = self._context.decode()
        done.seconds = time.monotonic() - started
        if code == NO_ROOM:
            self._preempt()
            return Pass()
        for each, size in done.pieces:
            each.done += size
        return done

    def _put_decodes(self, done: Pass) -> None:
        decoding = [each for each in self._running.values() if not each.in_prefill]
        outputs = self._context.put_outputs(
            [each.slot for each in decoding],
            [len(each.waiting.prompt) + each.count - 1 for each in decoding],
            [each.last for each in decoding],
        )
        for running, output in zip(decoding, outputs, strict=True):
            running.output = output
        done.decoded = len(decoding)

    def _put_prompts(self, done: Pass) -> None:
        """Prefixes first: requests wait for them. With the last token of a request's prompt an output is asked for."""
        room = self._batch_tokens - done.decoded
        for prefix in self._prefixes.unfinished:
            size = min(room, len(prefix.tokens) - prefix.done)
            self._put_piece(done, prefix, prefix.sequence, prefix.tokens, size, last_wanted=False)
            room -= size
        for running in self._running.values():
            if running.in_prefill:
                prompt = running.waiting.prompt
                size = min(room, len(prompt) - running.done)
                complete = running.done + size == len(prompt)
                last = self._put_piece(done, running, running.slot, prompt, size, last_wanted=complete)
                running.output = last if complete else -1
                room -= size

    def _put_piece(
        self, done: Pass, owner: Prefix | Running, sequence: int, tokens: Tokens, size: int, *, last_wanted: bool
    ) -> int:
        """The next ``size`` tokens of a prompt or prefix; returns the batch index of the last."""
        if size <= 0:
            return -1
        done.pieces.append((owner, size))
        done.prefilled += size
        return self._context.put(sequence, owner.done, tokens[owner.done : owner.done + size], last_wanted=last_wanted)

    def _preempt(self) -> None:
        """No KV room, against the book-keeping. Forget a prefix, or let the youngest sequence start again later."""
        for running in self._running.values():
            running.output = -1
        if self._prefixes.forget_one(self._prompts_waiting()):
            return
        if not self._running:
            self._prefixes.forget_all()
            for waiting in self._waiting:
                waiting.shared = 0
            return
        youngest = max(reversed(self._running.values()), key=lambda each: each.admitted_at)
        self._release(youngest)
        self._crowded = True
        self._count(wasted_tokens=youngest.count)
        if self._running:
            self._waiting.appendleft(youngest.waiting)
            return
        message = f"the KV cache of {self._context.cells:,} cells has no room for this request"
        self._rejected.append(Rejected(youngest.request.key, ErrorClass.OUT_OF_MEMORY, message))

    # --- retire ------------------------------------------------------------------------------------------------------

    def _retire(self) -> list[Event]:
        events, self._rejected = self._rejected, []
        for running in list(self._running.values()):
            event = self._sample(running) if running.output >= 0 else None
            if event is None:
                event = self._timed_out(running)
            if event is not None:
                self._release(running)
                events.append(event)
        return events

    def _sample(self, running: Running) -> Event | None:
        """Draw a token; the event when the sequence has ended with it."""
        token = running.last = self._context.sampled(running.slot, running.output)
        running.output = -1
        now = time.monotonic()
        if running.first_token_at is None:
            running.first_token_at = now
        running.count += 1
        self._sampled += 1
        if self._vocabulary.ends(token):
            if not running.request.sampling.ignore_eos:
                return self._finished(running, FinishReason.STOP, now)
        elif running.text.append(self._vocabulary.piece(token)):
            return self._finished(running, FinishReason.STOP, now)
        if running.count >= running.waiting.limit:
            return self._finished(running, FinishReason.LENGTH, now)
        return None

    def _finished(self, running: Running, reason: FinishReason, now: float) -> Finished:
        assert running.first_token_at is not None
        return Finished(
            running.request.key, str(running.text), reason, running.usage, running.admitted_at,
            running.first_token_at, now,
        )  # fmt: skip

    def _timed_out(self, running: Running) -> Event | None:
        limit = running.request.sampling.timeout_s
        if limit is None or (now := time.monotonic()) - running.admitted_at < limit:
            return None
        self._count(wasted_tokens=running.count)
        return Rejected(
            running.request.key, ErrorClass.TIMEOUT, f"no answer within {limit:g} s", running.usage,
            running.admitted_at, running.first_token_at, now,
        )  # fmt: skip

    def _release(self, running: Running) -> None:
        self._crowded = False
        del self._running[running.slot]
        self._context.drop(running.slot)
        self._free.append(running.slot)
        if running.prefix is not None:
            running.prefix.users -= 1

    # --- what it did -------------------------------------------------------------------------------------------------

    def _account(self, started: float, starved: bool, done: Pass) -> None:
        """Share the pass out by tokens; the rest of the step is overhead."""
        self._last_end = time.monotonic()
        spent, tokens = self._last_end - started, done.decoded + done.prefilled
        self._count(
            steps=1 if tokens else 0,
            prefill_s=done.seconds * done.prefilled / tokens if tokens else 0.0,
            decode_s=done.seconds * done.decoded / tokens if tokens else 0.0,
            overhead_s=spent - done.seconds,
            prefill_tokens=done.prefilled,
            decode_tokens=self._sampled,
            starved_s=spent if starved else 0.0,
        )
        self._peak_active = max(self._peak_active, len(self._running))
        self._peak_cells = max(self._peak_cells, self._used_cells())

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._sums[name] += value  # type: ignore[assignment]


def _cells(waiting: Waiting, shared: int) -> int:
    """KV cells of a request of which a prefix holds the first ``shared``."""
    return len(waiting.prompt) - shared + waiting.limit


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
