"""MLX through mlx-lm's continuous batcher: waiting requests join the running batch as its rows become free.

Nothing here imports MLX before an engine is loaded: counting tokens must not touch a device, and MLX allows no fork.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import psutil

from promptmill.errors import ModelError, RequestError
from promptmill.tasks.sampling import refuse_unknown_tokens
from promptmill.types import EngineCounters, ErrorClass, Extras, FinishReason, Usage
from promptmill_workers.engines.answer import Generation, Tools
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
)
from promptmill_workers.engines.kv_budget import fit
from promptmill_workers.engines.mlx_lm.prefixes import MlxPrefixes
from promptmill_workers.engines.mlx_lm.slots import MlxRunning, MlxWaiting, TooLong
from promptmill_workers.engines.mlx_lm.text import MlxAnswerText, MlxTokenCounter, MlxTokenizer
from promptmill_workers.engines.prefix_plan import plan

if TYPE_CHECKING:
    from promptmill_workers.engines.mlx_lm.binding import Batcher, HostedSampler, MlxModel, SequenceId, Token

#: Context of a request when nobody asked for another one.
CONTEXT_TOKENS = 4096

#: Requests that are turned into tokens in one step while sequences run: they must not wait for a long list.
TOKENISED_PER_STEP = 64


class MlxEngine:
    """The engine of the contract over ``mlx_lm.generate.BatchGenerator``."""

    def __init__(self, batcher: Batcher, tokenizer: MlxTokenizer, info: EngineInfo) -> None:
        self._batcher = batcher
        self._tokenizer = tokenizer
        self._info = info
        self._tools = Tools(
            ends=tokenizer.eos_ids.__contains__,
            piece=tokenizer.piece,
            tokens=tokenizer.within,
            text=lambda stops: MlxAnswerText(tokenizer, stops),
            grammars=Grammars(lambda: tokenizer.constraint_tokenizer(batcher.vocabulary), batcher.vocabulary),
        )
        self._incoming: deque[EngineRequest] = deque()
        self._waiting: deque[MlxWaiting] = deque()
        self._running: dict[SequenceId, MlxRunning] = {}
        self._prefixes = MlxPrefixes(batcher)
        self._planned = True
        self._rejected: list[Event] = []
        self._counters = EngineCounters()
        self._last_end = time.monotonic()

    @classmethod
    def load(cls, path: Path | None, model_name: str, options: EngineOptions) -> Self:
        """Raises ModelError or DeviceError."""
        from promptmill_workers.engines.mlx_lm.binding import Batcher, MlxModel, open_device

        assert path is not None
        cls.check(options)
        device, device_got = open_device(options.device)
        tokenizer = MlxTokenizer(path)
        model = MlxModel(path)
        info = _info(model, tokenizer, model_name, options, device_got)
        batcher = Batcher(model, sorted(tokenizer.eos_ids), device, info.slots, options.batch_tokens)
        return cls(batcher, tokenizer, info)

    @staticmethod
    def check(options: EngineOptions) -> None:
        """Raises ModelError for options that cannot be had, whatever the model."""
        refuse_slots(options.slots)
        if options.kv_type != "f16":
            raise ModelError("MLX's continuous batcher keeps no quantised KV cache", hint="Unset JOBS_KV_TYPE.")

    @staticmethod
    def token_counter(path: Path | None) -> MlxTokenCounter:
        """Raises ModelError."""
        assert path is not None
        return MlxTokenCounter(MlxTokenizer(path))

    # --- the contract ------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def counters(self) -> EngineCounters:
        return self._counters

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._incoming) + len(self._waiting)

    @property
    def kv_cells_used(self) -> int:
        return self._row_cells() + self._prefixes.cells

    def waiting_keys(self) -> Collection[RequestKey]:
        return {each.key for each in self._incoming} | {each.request.key for each in self._waiting}

    def add(self, requests: Sequence[EngineRequest]) -> None:
        enqueue(self._incoming, requests)

    def cancel(self, key: RequestKey) -> None:
        for sequence, running in self._running.items():
            if running.request.key == key:
                self._drop(sequence)
                return
        self._incoming = deque(each for each in self._incoming if each.key != key)
        self._waiting = deque(each for each in self._waiting if each.request.key != key)
        self._rejected = [each for each in self._rejected if each.key != key]

    def render(self, request: EngineRequest) -> str:
        return self._tokenizer.render(request)

    def close(self) -> None:
        self._running.clear()
        self._prefixes.clear()
        self._batcher.close()

    def step(self) -> Sequence[Event]:
        started = time.monotonic()
        self._count(idle_s=started - self._last_end)
        before = self._counters
        self._admit(started)
        is_starved = bool(self._waiting) and len(self._running) < self._info.slots
        tokens = self._forward()
        events = [*self._take_rejected(), *self._retire(tokens), *self._time_out()]
        self._account(started, before, is_starved)
        return events

    # --- admit -------------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        self._tokenise()
        if not self._planned:
            self._plan()
        at_once = self._info.slots
        while self._waiting and len(self._running) < self._info.slots and self._make_room(self._waiting[0]):
            waiting = self._waiting.popleft()
            if not waiting.slotless:
                self._start(waiting, now)
                continue
            self._compute(waiting, now)
            at_once -= 1
            if at_once == 0:
                break
        self._counters = replace(
            self._counters,
            peak_active=max(self._counters.peak_active, len(self._running)),
            peak_kv_cells=max(self._counters.peak_kv_cells, self.kv_cells_used),
        )

    def _tokenise(self) -> None:
        """Turn some of what came in into tokens; all of it when nothing runs."""
        quota = TOKENISED_PER_STEP if self._running else len(self._incoming)
        for _ in range(min(quota, len(self._incoming))):
            request = self._incoming.popleft()
            try:
                self._waiting.append(self._prepared(request))
            except RequestError as problem:
                self._reject(request, ErrorClass.INVALID_REQUEST, problem.message)
            except TooLong as problem:
                self._reject(request, ErrorClass.CONTEXT_OVERFLOW, str(problem))
            else:
                self._planned = False

    def _prepared(self, request: EngineRequest) -> MlxWaiting:
        """Raises RequestError or TooLong."""
        refuse_unknown_tokens(request.sampling, self._tokenizer.size)
        prompt, scored = self._tokenizer.tokens(request), 0
        if request.continuation is not None:
            more = self._tokenizer.continuation(request.continuation, closed=request.closed, after=int(prompt[-1]))
            prompt, scored = np.concatenate([prompt, more]), len(more)
        room = self._info.context_tokens - len(prompt)
        if room < 1:
            raise TooLong(f"the prompt has {len(prompt):,} tokens, the context {self._info.context_tokens:,}")
        limit = 0 if scored or request.sampling.embedding else max(1, min(request.sampling.max_tokens, room))
        return MlxWaiting(request, prompt, limit, self._tokenizer.opened(request)[1], scored)

    def _reject(self, request: EngineRequest, error_class: ErrorClass, message: str) -> None:
        self._rejected.append(Rejected(request.key, error_class, message))

    def _plan(self) -> None:
        """Decide which prefixes to share, and bring together requests that share one and are of like length.

        A prefill pass is padded to its longest prompt: in the order of real comments that came to 60 % more tokens,
        in this one to 10 %. Nobody waits for ever, because no more than a few chunks are ever here.
        """
        self._planned = True
        waiting = list(self._waiting)
        group = [0] * len(waiting)
        for each in waiting:
            each.shared = 0
        for number, found in enumerate(
            plan([each.question for each in waiting], owners=[each.owner for each in waiting]), start=1
        ):
            for member in found.members:
                waiting[member].shared = found.length
                group[member] = number
        order = sorted(
            range(len(waiting)),
            key=lambda at: (not waiting[at].request.urgent, group[at], -len(waiting[at].prompt), at),
        )
        self._waiting = deque(waiting[at] for at in order)

    def _start(self, waiting: MlxWaiting, now: float) -> None:
        """Give the request a slot, its prefix computed before it if it is the first that wants it.

        That first one pays for its prefix: so the tokens computed add up over the requests.
        """
        sampling = waiting.request.sampling
        try:
            answer = Generation(self._tools, sampling, waiting.prompt, waiting.limit, thinks=waiting.thinks)
        except RequestError as problem:
            self._reject(waiting.request, ErrorClass.GRAMMAR, problem.message)
            return
        prefix, cached = self._prefixes.begin(waiting.owner, waiting.prompt, waiting.shared)
        rest = waiting.prompt[len(prefix.tokens) :] if prefix else waiting.prompt
        hosted = self._hosted(answer, waiting)
        sequence = self._batcher.insert(rest, waiting.limit, sampling, prefix.cache if prefix else None, hosted)
        self._running[sequence] = MlxRunning(waiting, answer, hosted, cached, now)

    def _hosted(self, answer: Generation, waiting: MlxWaiting) -> HostedSampler | None:
        """What hands its tokens out on the host, where that is needed."""
        sampling = waiting.request.sampling
        # A budget of reasoning is kept by putting its end into the sampler's mouth.
        has_budget = waiting.thinks and sampling.thinking_budget is not None
        if not (answer.draws or answer.observes or has_budget):
            return None
        from promptmill_workers.engines.mlx_lm.binding import HostedSampler

        return HostedSampler(answer, min(self._tokenizer.eos_ids, default=0), self._batcher.drawer(sampling))

    def _compute(self, waiting: MlxWaiting, now: float) -> None:
        """Answer a request for which nothing is generated, at once."""
        request, prompt = waiting.request, waiting.prompt
        cached, text = 0, request.continuation or ""
        try:
            if waiting.scored:
                prefix, cached = self._prefixes.begin(waiting.owner, waiting.question, waiting.shared)
                known = prefix.tokens if prefix else prompt[:0]
                logprob, greedy = self._batcher.score(prompt, waiting.scored, known, prefix.cache if prefix else None)
                score = {"text": text, "logprob": logprob, "tokens": waiting.scored, "greedy": greedy}
                extras = Extras(continuations=[score])
            else:
                extras = Extras(embedding=self._batcher.embed(prompt))
        except RequestError as problem:
            self._reject(request, ErrorClass.INVALID_REQUEST, problem.message)
            return
        end = time.monotonic()
        self._count(steps=1, prefill_s=end - now, prefill_tokens=len(prompt) - waiting.scored - cached)
        usage = Usage(len(prompt) - waiting.scored, cached, 0)
        self._rejected.append(Finished(request.key, text, FinishReason.STOP, usage, now, end, end, extras))

    def _make_room(self, waiting: MlxWaiting) -> bool:
        """Whether there are cells for the request and its prefix, after forgetting other prefixes if need be.

        It waits for a row to end rather than lose its own prefix, which those behind it want too. Alone it always
        fits: there are as many cells as a context has.
        """
        wanted = self._prefixes.wanted(waiting.owner, waiting.prompt, waiting.shared)
        own = len(wanted.tokens) if wanted else waiting.shared
        needed = self._row_cells() + waiting.cells + own
        if needed <= self._info.kv_cells:
            others = self._prefixes.cells - (len(wanted.tokens) if wanted else 0)
            self._prefixes.forget(needed + others - self._info.kv_cells, keep=wanted)
            return True
        if self._running:
            return False
        self._prefixes.clear()
        waiting.shared = 0
        return True

    def _row_cells(self) -> int:
        return sum(each.waiting.cells for each in self._running.values())

    # --- forward and retire ------------------------------------------------------------------------------------------

    def _forward(self) -> list[Token]:
        """One step of the batcher; its tokens are on the host. Nothing when nothing runs."""
        if not self._running:
            return []
        prefixes, done = self._prefixes.take_work(), self._batcher.step()
        self._count(
            steps=1,
            # mlx-lm's own clock. A decode that is still being computed when a prefill begins is waited for there.
            prefill_s=done.prefill_s + prefixes.seconds,
            decode_s=done.decode_s,
            prefill_tokens=done.prefill_tokens + prefixes.tokens,
            decode_tokens=len(done.tokens),
        )
        return done.tokens

    def _take_rejected(self) -> list[Event]:
        taken, self._rejected = self._rejected, []
        return taken

    def _retire(self, tokens: Sequence[Token]) -> list[Event]:
        now = time.monotonic()
        events: list[Event] = []
        for each in tokens:
            running = self._running[each.sequence]
            event = self._receive(running, each, now)
            if running.request.stream and (text := running.answer.fresh()):
                events.append(TokenEvent(running.request.key, text, running.answer.fresh_logprobs()))
            if event is not None:
                events.append(event)
        return events

    def _receive(self, running: MlxRunning, drawn: Token, now: float) -> Event | None:
        """Add a token to its answer; the event when the sequence has ended with it."""
        running.count += 1
        if running.first_token_at is None:
            running.first_token_at = now
        outcome = running.hosted.outcomes.popleft() if running.hosted else running.answer.take(drawn.token)
        if outcome is None:
            return None
        if not drawn.ended:
            self._batcher.remove(drawn.sequence)
        del self._running[drawn.sequence]
        if isinstance(outcome, GrammarError):
            self._count(wasted_tokens=running.count)
            return Rejected(
                running.request.key, ErrorClass.GRAMMAR, outcome.message, running.usage, running.admitted_at,
                running.first_token_at, now,
            )  # fmt: skip
        text, reason, extras = running.answer.finish(outcome)
        return Finished(
            running.request.key, text, reason, running.usage, running.admitted_at, running.first_token_at, now, extras
        )

    def _time_out(self) -> list[Event]:
        now = time.monotonic()
        late = [sequence for sequence, running in self._running.items() if running.is_late(now)]
        return [self._timed_out(sequence, now) for sequence in late]

    def _timed_out(self, sequence: SequenceId, now: float) -> Rejected:
        running = self._drop(sequence)
        return Rejected(
            running.request.key, ErrorClass.TIMEOUT, f"no answer within {running.request.sampling.timeout_s:g} s",
            running.usage, running.admitted_at, running.first_token_at, now,
        )  # fmt: skip

    def _drop(self, sequence: SequenceId) -> MlxRunning:
        """Free a slot whose tokens are of no use."""
        running = self._running.pop(sequence)
        self._batcher.remove(sequence)
        self._count(wasted_tokens=running.count)
        return running

    # --- what it did -------------------------------------------------------------------------------------------------

    def _account(self, started: float, before: EngineCounters, is_starved: bool) -> None:
        """Close the step's books: what was neither prefill nor decode is overhead."""
        self._last_end = time.monotonic()
        spent = self._last_end - started
        counted = self._counters.prefill_s + self._counters.decode_s - before.prefill_s - before.decode_s
        self._count(overhead_s=max(0.0, spent - counted), starved_s=spent if is_starved else 0.0)

    def _count(self, **more: float) -> None:
        now = {name: getattr(self._counters, name) + value for name, value in more.items() if value}
        if now:
            self._counters = replace(self._counters, **now)


def _info(model: MlxModel, tokenizer: MlxTokenizer, name: str, options: EngineOptions, device_got: str) -> EngineInfo:
    context = min(tokenizer.context_tokens, options.context_tokens or CONTEXT_TOKENS)
    room = fit(
        slots=options.slots, cells=options.kv_cells, context_tokens=context, cell_bytes=model.cell_bytes(),
        free_bytes=psutil.virtual_memory().available, gpu=device_got != "cpu",
    )  # fmt: skip
    return EngineInfo(
        engine="mlx", version=model.version, model_name=name, slots=room.slots, context_tokens=context,
        kv_cells=room.cells, device_got=device_got, layers=model.layers,
        layers_offloaded=0 if device_got == "cpu" else model.layers, extra=model.facts,
        exact=device_got == "cpu" and model.facts["dtypes"] == ["float32"],
        settings={"chat_template": tokenizer.template_digest},
    )  # fmt: skip
