"""llama.cpp with continuous batching: each step decodes one token of every running sequence and the next prompt tokens.

Three verbs make a step: admit waiting requests to free slots, run one batch forward, retire what has ended.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import llama_cpp

from promptmill.errors import RequestError
from promptmill.types import EngineCounters, ErrorClass, FinishReason
from promptmill_workers.engines.answer import Generation, Tools, needs_logits
from promptmill_workers.engines.constraint import GrammarError, Grammars
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
    refuse_slots,
    template_digest,
)
from promptmill_workers.engines.kv_budget import fit
from promptmill_workers.engines.llama.batch_plan import BatchPlan, fill
from promptmill_workers.engines.llama.binding import (
    NO_ROOM,
    Context,
    LlamaModel,
)
from promptmill_workers.engines.llama.embedding import Embeddings
from promptmill_workers.engines.llama.kv_cache import KVCache
from promptmill_workers.engines.llama.outputs import drawn, score
from promptmill_workers.engines.llama.prefixes import LlamaPrefix
from promptmill_workers.engines.llama.sampling import Shape, shape_of
from promptmill_workers.engines.llama.slots import LlamaRunning, LlamaWaiting, cells_of
from promptmill_workers.engines.llama.text import LlamaAnswerText, LlamaTokenCounter, PromptReader

#: Context of a request when nobody asked for another one.
CONTEXT_TOKENS = 4096

#: Shared prefixes that are kept at once. Each takes a sequence number and its cells.
PREFIXES = 8

#: Requests that are turned into tokens in one step while sequences run: they must not wait for a long list.
TOKENISED_PER_STEP = 64

#: Requests behind one whose prefix is being computed that may be admitted before it, for each slot.
LOOKED_AT_PER_SLOT = 4


class LlamaCppEngine:
    """The engine of the contract over llama.cpp's low-level bindings."""

    def __init__(self, model: LlamaModel, name: str, options: EngineOptions) -> None:
        self.check(options)
        self._model = model
        self._vocabulary = model.vocabulary
        self._prompts = PromptReader(model)
        self._context_tokens = min(model.context_trained, options.context_tokens or CONTEXT_TOKENS)
        room = fit(
            slots=options.slots, cells=options.kv_cells, context_tokens=self._context_tokens,
            cell_bytes=model.cell_bytes(options.kv_type), free_bytes=model.free_bytes(), gpu=model.offloaded > 0,
        )  # fmt: skip
        threads = options.threads or _cores()
        self._embeddings = Embeddings(model, tokens=self._context_tokens, threads=threads)
        batch_tokens = max(options.batch_tokens, room.slots + PREFIXES)
        self._context = Context(
            model, cells=room.cells, batch=batch_tokens, slots=room.slots,
            spare=PREFIXES, threads=threads, exact=options.exact, kv_type=options.kv_type,
        )  # fmt: skip
        self._context.warm_up()
        self._tools = Tools(
            ends=self._vocabulary.ends,
            piece=self._vocabulary.piece,
            tokens=self._vocabulary.within,
            text=lambda stops: LlamaAnswerText(self._vocabulary.piece, stops),
            grammars=Grammars(self._vocabulary.constraint_tokenizer, self._vocabulary.size),
        )
        self._incoming: deque[EngineRequest] = deque()
        spare = range(room.slots, room.slots + PREFIXES)
        self._room = KVCache(self._context, spare, shares=model.has_cells)
        self._running = self._room.running
        self._free = list(range(room.slots))[::-1]
        #: Nobody is admitted between a full KV cache and the next request that ends.
        self._crowded = False
        self._sampled = 0
        self._ready: list[Event] = []
        self._sums: Counter[str] = Counter()
        self._peak_active = self._peak_cells = 0
        self._last_end = time.monotonic()
        self._info = EngineInfo(
            engine="llamacpp", version=str(llama_cpp.__version__), model_name=name, slots=room.slots,
            context_tokens=self._context_tokens, kv_cells=self._context.cells, device_got=model.device_name(),
            layers=model.layers, layers_offloaded=model.offloaded,
            exact=model.is_float32 and not model.offloaded,
            settings={
                "chat_template": template_digest(model.chat_template, model.tool_template),
                "kv_type": options.kv_type, "flash_attention": self._context.flash_attention,
            },
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path | None, model_name: str, options: EngineOptions) -> Self:
        """Raises ModelError or DeviceError."""
        assert path is not None
        model = LlamaModel(path, gpu=options.device != "cpu", plain_kernels=options.plain_kernels)
        return cls(model, model_name, options)

    @staticmethod
    def check(options: EngineOptions) -> None:
        """Raises ModelError for options that cannot be had, whatever the model."""
        refuse_slots(options.slots)

    @staticmethod
    def token_counter(path: Path | None) -> LlamaTokenCounter:
        """Raises ModelError."""
        assert path is not None
        return LlamaTokenCounter(LlamaModel(path, vocab_only=True))

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
        return len(self._incoming) + len(self._room.waiting) + len(self._embeddings)

    @property
    def kv_cells_used(self) -> int:
        return self._room.used_cells

    def waiting_keys(self) -> Collection[RequestKey]:
        queued = (each.request for each in self._room.waiting)
        return {each.key for each in (*self._incoming, *queued, *self._embeddings.requests)}

    def add(self, requests: Sequence[EngineRequest]) -> None:
        enqueue(self._incoming, requests)

    def cancel(self, key: RequestKey) -> None:
        for running in list(self._running.values()):
            if running.request.key == key:
                self._release(running)
                self._count(wasted_tokens=running.answer.count)
                return
        self._incoming = deque(each for each in self._incoming if each.key != key)
        self._embeddings.cancel(key)
        self._room.waiting = deque(each for each in self._room.waiting if each.request.key != key)
        self._ready = [each for each in self._ready if each.key != key]

    def render(self, request: EngineRequest) -> str:
        return self._prompts.render(request)

    def close(self) -> None:
        self._embeddings.close()
        self._context.close()
        self._model.close()

    def step(self) -> Sequence[Event]:
        started = time.monotonic()
        self._count(idle_s=started - self._last_end)
        self._sampled = 0
        self._ready.extend(self._embeddings.step(started))
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
        if self._free and not self._room.planned:
            self._room.plan()
        looked_at = len(self._free) + LOOKED_AT_PER_SLOT * self._info.slots
        for waiting in list(islice(self._room.waiting, looked_at)):
            if not self._free:
                return
            prefix, shared, ready = self._room.prefix_for(waiting)
            if not ready:
                continue  # Its prefix is being computed; those behind it may go first.
            if not self._room.make(cells_of(waiting, shared if prefix else 0), keep=prefix):
                return  # Those behind it may not, or a request that needs many cells would never run.
            self._room.waiting.remove(waiting)
            self._begin(waiting, prefix, shared, now)

    def _tokenise(self) -> None:
        """Turn some of what came in into tokens; all of it when nothing runs."""
        quota = TOKENISED_PER_STEP if self._running else len(self._incoming)
        for _ in range(min(quota, len(self._incoming))):
            request = self._incoming.popleft()
            try:
                prompt = self._prompts.prompt(request, self._context_tokens)
            except RequestError as problem:
                error_class = getattr(problem, "error_class", ErrorClass.INVALID_REQUEST)
                self._ready.append(Rejected(request.key, error_class, problem.message))
                continue
            if request.sampling.embedding:
                self._embeddings.add(request, prompt.tokens)
                continue
            self._room.waiting.append(LlamaWaiting.of(request, prompt, self._context_tokens))
            self._room.planned = False

    def _begin(self, waiting: LlamaWaiting, prefix: LlamaPrefix | None, shared: int, now: float) -> None:
        """Give the request a slot."""
        sampling = waiting.request.sampling
        try:
            answer = Generation(self._tools, sampling, waiting.prompt, waiting.limit, thinks=waiting.thinks)
        except GrammarError as problem:
            self._ready.append(Rejected(waiting.request.key, ErrorClass.GRAMMAR, problem.message))
            return
        is_simple = sampling.is_greedy and not self._model.offloaded
        hosted = needs_logits(sampling) or sampling.logprobs or waiting.scored > 0 or is_simple
        shape = None if hosted else shape_of(sampling)
        slot = self._slot_for(shape)
        if prefix is not None:
            cached, done = self._room.prefixes.use(prefix, slot, shared, now), shared
        else:
            cached = done = self._share_with_neighbour(slot, waiting)
        seed = sampling.seed if sampling.seed is not None else random.getrandbits(31)
        self._context.set_sampling(slot, shape, seed)
        if sampling.logprobs and not sampling.is_greedy:
            self._context.set_aside(slot, shape_of(sampling), seed)
        self._running[slot] = LlamaRunning(slot, waiting, prefix, shared, cached, done, now, answer, hosted)

    def _share_with_neighbour(self, slot: int, waiting: LlamaWaiting) -> int:
        """Take over what a running sequence has computed of the prompt; returns how many tokens."""
        neighbour, shared = self._room.neighbour(waiting.owner, waiting.head)
        if neighbour is not None:
            self._context.share(neighbour.slot, slot, shared)
        return shared

    def _slot_for(self, shape: Shape) -> int:
        """A free slot, best one whose sampler has the same shape: another shape costs a new graph."""
        slot = next((each for each in reversed(self._free) if self._context.shape(each) == shape), self._free[-1])
        self._free.remove(slot)
        return slot

    # --- forward -----------------------------------------------------------------------------------------------------

    def _forward(self) -> BatchPlan:
        """One batch: a token of every decoding sequence, then prompt tokens as they fit."""
        # Of prompts that do not fit together, urgent ones are computed first.
        running = sorted(self._running.values(), key=lambda each: not each.request.urgent)
        done = fill(self._context.batch, running, self._room.prefixes.unfinished)
        if done.decoded + done.prefilled == 0:
            return done
        started = time.monotonic()
        code = self._context.decode()
        done.seconds = time.monotonic() - started
        if code == NO_ROOM:
            self._preempt()
            return BatchPlan()
        done.settle()
        return done

    def _preempt(self) -> None:
        """No KV room, against the book-keeping. Forget a prefix, or let the youngest sequence start again later."""
        for running in self._running.values():
            running.output, running.outputs = -1, range(0)
        if self._room.prefixes.forget_one(self._room.prompts()):
            return
        if not self._running:
            self._room.prefixes.forget_all()
            for waiting in self._room.waiting:
                waiting.shared = 0
            return
        # Of one that streams somebody has seen a part.
        youngest = max(reversed(self._running.values()), key=lambda each: (not each.request.stream, each.admitted_at))
        self._release(youngest)
        self._crowded = True
        self._count(wasted_tokens=youngest.answer.count)
        if self._running:
            self._room.waiting.appendleft(youngest.waiting)
            return
        message = f"the KV cache of {self._context.cells:,} cells has no room for this request"
        self._ready.append(Rejected(youngest.request.key, ErrorClass.OUT_OF_MEMORY, message))

    # --- retire ------------------------------------------------------------------------------------------------------

    def _retire(self) -> list[Event]:
        events, self._ready = self._ready, []
        for running in list(self._running.values()):
            event = self._read(running, events)
            if event is None:
                event = self._timed_out(running)
            if event is not None:
                self._release(running)
                events.append(event)
        return events

    def _read(self, running: LlamaRunning, events: list[Event]) -> Event | None:
        """Take what the pass gave for the sequence; the event when it has ended with it."""
        if running.waiting.scored:
            return score(self._context, running)
        if running.output < 0:
            return None
        try:
            reason = self._sample(running)
        except GrammarError as problem:
            return self._failed(running, ErrorClass.GRAMMAR, problem.message)
        if running.request.stream and (text := running.answer.fresh()):
            events.append(TokenEvent(running.request.key, text, running.answer.fresh_logprobs()))
        return None if reason is None else self._finished(running, reason, events)

    def _sample(self, running: LlamaRunning) -> FinishReason | None:
        """Draw a token, and take those that must follow it; why the answer has ended with one. Raises GrammarError."""
        answer, output, running.output = running.answer, running.output, -1
        token = drawn(self._context, running, output)
        if running.first_token_at is None:
            running.first_token_at = time.monotonic()
        running.pending = [token]
        self._sampled += 1
        reason = answer.take(token)
        if answer.draws or running.waiting.thinks:
            forced = answer.forced() if reason is None else []
            for each in forced:
                running.pending.append(each)
                self._sampled += 1
                reason = answer.take(each)
                if reason is not None:
                    break
        return reason

    def _finished(self, running: LlamaRunning, reason: FinishReason, events: list[Event]) -> Finished:
        assert running.first_token_at is not None
        text, reason, extras = running.answer.finish(reason)
        return Finished(
            running.request.key, text, reason, running.usage, running.admitted_at, running.first_token_at,
            time.monotonic(), extras,
        )  # fmt: skip

    def _failed(self, running: LlamaRunning, error_class: ErrorClass, message: str) -> Rejected:
        """The request ends without an answer, after it had a slot."""
        self._count(wasted_tokens=running.answer.count)
        return Rejected(
            running.request.key, error_class, message, running.usage, running.admitted_at, running.first_token_at,
            time.monotonic(),
        )  # fmt: skip

    def _timed_out(self, running: LlamaRunning) -> Event | None:
        limit = running.request.sampling.timeout_s
        if limit is None or time.monotonic() - running.admitted_at < limit:
            return None
        return self._failed(running, ErrorClass.TIMEOUT, f"no answer within {limit:g} s")

    def _release(self, running: LlamaRunning) -> None:
        self._crowded = False
        del self._running[running.slot]
        self._context.drop(running.slot)
        self._free.append(running.slot)
        if running.prefix is not None:
            running.prefix.users -= 1

    # --- what it did -------------------------------------------------------------------------------------------------

    def _account(self, started: float, starved: bool, done: BatchPlan) -> None:
        """Share the pass out by tokens; the rest of the step is overhead."""
        self._last_end = time.monotonic()
        spent, tokens = self._last_end - started, done.decoded + done.prefilled
        embedded, embed_s = self._embeddings.take_work()
        self._count(
            steps=1 if tokens or embedded else 0,
            prefill_s=embed_s + (done.seconds * done.prefilled / tokens if tokens else 0.0),
            decode_s=done.seconds * done.decoded / tokens if tokens else 0.0,
            overhead_s=spent - done.seconds - embed_s,
            prefill_tokens=done.prefilled + embedded,
            decode_tokens=self._sampled,
            starved_s=spent if starved else 0.0,
        )
        self._peak_active = max(self._peak_active, len(self._running))
        self._peak_cells = max(self._peak_cells, self._room.used_cells)

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._sums[name] += value  # type: ignore[assignment]


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
