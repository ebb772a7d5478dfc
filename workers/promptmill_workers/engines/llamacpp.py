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
from pathlib import Path
from typing import Self

import llama_cpp

from promptmill.errors import ModelError, RequestError
from promptmill.types import EngineCounters, ErrorClass, FinishReason, Usage
from promptmill_workers.engines.chat_template import ChatTemplate
from promptmill_workers.engines.contract import (
    EngineInfo,
    EngineOptions,
    EngineRequest,
    Event,
    Finished,
    Rejected,
    RequestKey,
)
from promptmill_workers.engines.llama_binding import (
    MOST_SEQUENCES,
    NO_ROOM,
    Context,
    Model,
    Tokens,
    Vocabulary,
    shape_of,
)
from promptmill_workers.prefix_plan import LEAST_TOKENS, common_length, plan

#: Context of a request when nobody asked for another one.
CONTEXT_TOKENS = 4096

#: KV cells that a slot is given on average.
CELLS_PER_SLOT = 1024

#: Shared prefixes that are kept at once. Each takes a sequence number and its cells.
PREFIXES = 8

#: Requests that are turned into tokens in one step while sequences run: they must not wait for a long list.
TOKENISED_PER_STEP = 64


@dataclass(slots=True, eq=False)
class Prefix:
    """A shared prefix in a sequence of its own. ``done`` of its tokens are in the KV cache."""

    sequence: int
    tokens: Tokens
    done: int = 0
    users: int = 0
    used_at: float = 0.0

    @property
    def ready(self) -> bool:
        return self.done == len(self.tokens)


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that is tokenised and has no slot. ``shared`` tokens of its prompt are planned to be computed once."""

    request: EngineRequest
    prompt: Tokens
    limit: int
    shared: int = 0


@dataclass(slots=True, eq=False)
class Running:
    """A request in a slot. ``done`` of its prompt tokens are in the KV cache."""

    slot: int
    waiting: Waiting
    prefix: Prefix | None
    cached: int
    done: int
    admitted_at: float
    first_token_at: float | None = None
    count: int = 0
    last: int = -1
    text: bytearray = field(default_factory=bytearray)
    #: Batch index of the output that this step samples; -1 when the prompt is not finished.
    output: int = -1

    @property
    def request(self) -> EngineRequest:
        return self.waiting.request

    @property
    def in_prefill(self) -> bool:
        return self.done < len(self.waiting.prompt)

    @property
    def cells(self) -> int:
        """KV cells that are set aside for it, without those of its prefix."""
        return len(self.waiting.prompt) - self.cached + self.waiting.limit

    @property
    def usage(self) -> Usage:
        return Usage(len(self.waiting.prompt), self.cached, self.count)


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
        self._batch_tokens = max(options.batch_tokens, options.slots)
        self._context = Context(
            model, cells=max(cells, self._context_tokens), batch=self._batch_tokens, slots=options.slots,
            spare=PREFIXES, threads=options.threads or _cores(),
        )  # fmt: skip
        self._context.warm_up()
        self._incoming: deque[EngineRequest] = deque()
        self._waiting: deque[Waiting] = deque()
        self._running: dict[int, Running] = {}
        self._free = list(range(options.slots))[::-1]
        self._prefixes: list[Prefix] = []
        self._spare = [options.slots + index for index in range(PREFIXES)]
        self._planned = True
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
        starved = bool(self._free and self._waiting)
        computed = self._forward()
        events = self._retire()
        self._account(started, starved, *computed)
        return events

    # --- admit -------------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        self._tokenise()
        if not self._planned:
            self._plan()
        while self._free and self._waiting:
            # A request whose prefix is still being computed waits; those behind it may go first.
            ready = next((each for each in self._waiting if self._try_admit(each, now)), None)
            if ready is None:
                return
            self._waiting.remove(ready)

    def _tokenise(self) -> None:
        """Turn some of what came in into tokens; all of it when nothing runs."""
        quota = TOKENISED_PER_STEP if self._running else len(self._incoming)
        for _ in range(min(quota, len(self._incoming))):
            request = self._incoming.popleft()
            try:
                prompt = self._prompts.tokens(request)
            except RequestError as problem:
                self._rejected.append(Rejected(request.key, ErrorClass.INVALID_REQUEST, problem.message))
                continue
            room = self._context_tokens - len(prompt)
            if room < 1:
                message = f"the prompt has {len(prompt):,} tokens, the context {self._context_tokens:,}"
                self._rejected.append(Rejected(request.key, ErrorClass.CONTEXT_OVERFLOW, message))
                continue
            self._waiting.append(Waiting(request, prompt, min(request.sampling.max_tokens, room)))
            self._planned = False

    def _plan(self) -> None:
        """Decide which prefixes to share, and bring requests that share one together."""
        self._planned = True
        if not self._model.has_cells:
            return
        waiting = list(self._waiting)
        for each in waiting:
            each.shared = 0
        first = list(range(len(waiting)))
        for group in plan([each.prompt for each in waiting]):
            for member in group.members:
                waiting[member].shared = group.length
                first[member] = group.members[0]
        # Stable: groups stay in the order of their first request, and requests in the order they came.
        self._waiting = deque(waiting[index] for index in _grouped(first))

    def _try_admit(self, waiting: Waiting, now: float) -> bool:
        """Give the request a slot; False while its prefix is not ready or the KV cells do not suffice."""
        prefix, shared = self._prefix_for(waiting)
        if prefix is not None and not prefix.ready:
            return False
        cells = len(waiting.prompt) - shared + waiting.limit
        if not self._make_room(cells, keep=prefix):
            return False
        slot = self._free.pop()
        if prefix is not None:
            self._context.share(prefix.sequence, slot, shared)
            prefix.users += 1
            prefix.used_at = now
        sampling = waiting.request.sampling
        seed = sampling.seed if sampling.seed is not None else random.getrandbits(32)
        self._context.set_sampling(slot, shape_of(sampling), seed)
        self._running[slot] = Running(slot, waiting, prefix, shared, shared, now)
        return True

    def _prefix_for(self, waiting: Waiting) -> tuple[Prefix | None, int]:
        """The prefix to use and how many of its tokens: the best that is here, or a new one if the plan wants more."""
        head = waiting.prompt[:-1]
        best, shared = None, LEAST_TOKENS - 1
        for prefix in self._prefixes:
            length = common_length(prefix.tokens, head)
            if length > shared:
                best, shared = prefix, length
        if waiting.shared >= LEAST_TOKENS and waiting.shared - (shared if best else 0) >= LEAST_TOKENS:
            made = self._new_prefix(waiting.prompt[: waiting.shared])
            if made is not None:
                return made, len(made.tokens)
        return (best, shared) if best is not None else (None, 0)

    def _new_prefix(self, tokens: Tokens) -> Prefix | None:
        """Start a prefix; None when there is neither a sequence nor room for it."""
        if not self._spare and not self._evict_one(None):
            return None
        if not self._make_room(len(tokens), keep=None):
            return None
        prefix = Prefix(self._spare.pop(), tokens.copy(), used_at=time.monotonic())
        self._prefixes.append(prefix)
        return prefix

    def _make_room(self, cells: int, keep: Prefix | None) -> bool:
        """Whether ``cells`` are free, after forgetting prefixes that nobody uses, the longest unused first."""
        while self._used_cells() + cells > self._context.cells:
            if not self._evict_one(keep):
                return False
        return True

    def _used_cells(self) -> int:
        return sum(len(each.tokens) for each in self._prefixes) + sum(each.cells for each in self._running.values())

    def _evict_one(self, keep: Prefix | None) -> bool:
        # A prefix in use shares its cells with running sequences: forgetting it would free nothing.
        idle = [each for each in self._prefixes if each.users == 0 and each is not keep and each.ready]
        if not idle:
            return False
        oldest = min(idle, key=lambda each: each.used_at)
        self._context.drop(oldest.sequence)
        self._prefixes.remove(oldest)
        self._spare.append(oldest.sequence)
        return True

    # --- forward -----------------------------------------------------------------------------------------------------

    def _forward(self) -> tuple[int, int]:
        """One batch: a token of every decoding sequence, then prompt tokens as they fit. Returns their counts."""
        self._context.clear_batch()
        decoding = self._put_decodes()
        room = self._batch_tokens - decoding
        reached: list[tuple[Prefix | Running, int]] = []
        for prefix in self._prefixes:
            if not prefix.ready and room > 0:
                size = min(room, len(prefix.tokens) - prefix.done)
                self._context.put(
                    prefix.sequence, prefix.done, prefix.tokens[prefix.done : prefix.done + size], last_wanted=False
                )
                reached.append((prefix, size))
                room -= size
        for running in self._running.values():
            if running.in_prefill and room > 0:
                size = self._put_prompt(running, room)
                reached.append((running, size))
                room -= size
        prefilled = sum(size for _, size in reached)
        if decoding + prefilled == 0:
            return 0, 0
        if self._context.decode() == NO_ROOM:
            self._preempt()
            return 0, 0
        for each, size in reached:
            each.done += size
        return decoding, prefilled

    def _put_decodes(self) -> int:
        count = 0
        for running in self._running.values():
            running.output = -1
            if not running.in_prefill:
                position = len(running.waiting.prompt) + running.count - 1
                running.output = self._context.put(running.slot, position, (running.last,), last_wanted=True)
                count += 1
        return count

    def _put_prompt(self, running: Running, room: int) -> int:
        """The next piece of a prompt; with its last token an output is asked for."""
        prompt = running.waiting.prompt
        size = min(room, len(prompt) - running.done)
        complete = running.done + size == len(prompt)
        piece = prompt[running.done : running.done + size]
        index = self._context.put(running.slot, running.done, piece, last_wanted=complete)
        running.output = index if complete else -1
        return size

    def _preempt(self) -> None:
        """No KV room, against the book-keeping: the youngest sequence starts again later."""
        youngest = max(self._running.values(), key=lambda each: each.admitted_at)
        self._release(youngest)
        self._count(wasted_tokens=youngest.count)
        self._waiting.appendleft(youngest.waiting)
        if not self._running:
            self._waiting.popleft()
            message = "the KV cache has no room for this request"
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
        token = self._context.sampled(running.slot, running.output)
        running.output = -1
        now = time.monotonic()
        if running.first_token_at is None:
            running.first_token_at = now
        running.last = token
        running.count += 1
        self._sampled += 1
        sampling = running.request.sampling
        if self._vocabulary.ends(token):
            if not sampling.ignore_eos:
                return self._finished(running, FinishReason.STOP, now)
        else:
            start = len(running.text)
            running.text += self._vocabulary.piece(token)
            if sampling.stop and self._cut_at_stop(running, start):
                return self._finished(running, FinishReason.STOP, now)
        if running.count >= running.waiting.limit:
            return self._finished(running, FinishReason.LENGTH, now)
        return None

    def _cut_at_stop(self, running: Running, start: int) -> bool:
        """Cut the text before the first stop string that the newest token completed."""
        stops = [stop.encode() for stop in running.request.sampling.stop]
        found = [
            at for stop in stops if (at := running.text.find(stop, max(0, start - len(stop) + 1))) >= 0
        ]  # fmt: skip
        if found:
            del running.text[min(found) :]
        return bool(found)

    def _finished(self, running: Running, reason: FinishReason, now: float) -> Finished:
        assert running.first_token_at is not None
        text = running.text.decode("utf-8", errors="replace")
        return Finished(
            running.request.key, text, reason, running.usage, running.admitted_at, running.first_token_at, now
        )

    def _timed_out(self, running: Running) -> Event | None:
        limit, now = running.request.sampling.timeout_s, time.monotonic()
        if limit is None or now - running.admitted_at < limit:
            return None
        self._count(wasted_tokens=running.count)
        return Rejected(
            running.request.key, ErrorClass.TIMEOUT, f"no answer within {limit:g} s", running.usage,
            running.admitted_at, running.first_token_at, now,
        )  # fmt: skip

    def _release(self, running: Running) -> None:
        del self._running[running.slot]
        self._context.drop(running.slot)
        self._free.append(running.slot)
        if running.prefix is not None:
            running.prefix.users -= 1

    # --- what it did -------------------------------------------------------------------------------------------------

    def _account(self, started: float, starved: bool, decoding: int, prefilled: int) -> None:
        """Share the step's time out by tokens; a step without any is overhead."""
        self._last_end = time.monotonic()
        spent, tokens = self._last_end - started, decoding + prefilled
        self._count(
            steps=1 if tokens else 0,
            prefill_s=spent * prefilled / tokens if tokens else 0.0,
            decode_s=spent * decoding / tokens if tokens else 0.0,
            overhead_s=0.0 if tokens else spent,
            prefill_tokens=prefilled,
            decode_tokens=self._sampled,
            starved_s=spent if starved else 0.0,
        )
        self._peak_active = max(self._peak_active, len(self._running))
        self._peak_cells = max(self._peak_cells, self._used_cells())

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._sums[name] += value  # type: ignore[assignment]


def _grouped(first: Sequence[int]) -> list[int]:
    """Indices ordered by the first member of their group, then by themselves."""
    return sorted(range(len(first)), key=lambda index: (first[index], index))


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PromptReader:
    """Requests to prompt tokens, by the model's own chat template and vocabulary."""

    def __init__(self, model: Model) -> None:
        self._vocabulary: Vocabulary = model.vocabulary
        self._source = model.chat_template
        self._template: ChatTemplate | None = None

    def render(self, request: EngineRequest) -> str:
        """Raises RequestError."""
        if request.messages is None:
            return request.prompt or ""
        if self._template is None:
            if self._source is None:
                raise RequestError("the model has no chat template: send raw prompts (/v1/completions lines)")
            self._template = ChatTemplate(self._source, self._vocabulary.bos, self._vocabulary.eos)
        return self._template.render(request.messages)

    def tokens(self, request: EngineRequest) -> Tokens:
        """Raises RequestError, also for a prompt without a single token."""
        found = self._vocabulary.tokens(self.render(request), parse_special=request.messages is not None)
        if not len(found):
            raise RequestError("the prompt has no tokens")
        return found


class LlamaTokenCounter:
    """The vocabulary of a GGUF without its weights."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._prompts = PromptReader(model)

    @property
    def context_tokens(self) -> int:
        return self._model.context_trained

    def count(self, request: EngineRequest) -> int:
        return len(self._prompts.tokens(request))

    def render(self, request: EngineRequest) -> str:
        return self._prompts.render(request)
