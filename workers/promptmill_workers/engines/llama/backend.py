"""llama.cpp with continuous batching: a pass decodes a token of every running sequence, or computes prompt tokens."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Self

import llama_cpp

from promptmill.errors import RequestError
from promptmill.types import Extras, FinishReason
from promptmill_workers.engines.answer import Generation, Tools, needs_logits
from promptmill_workers.engines.constraint import Grammars
from promptmill_workers.engines.contract import (
    EngineInfo,
    EngineOptions,
    EngineRequest,
    refuse_slots,
    template_digest,
)
from promptmill_workers.engines.kv_budget import fit
from promptmill_workers.engines.llama.binding import NO_ROOM, Context, LlamaModel
from promptmill_workers.engines.llama.embedding import Embedder
from promptmill_workers.engines.llama.kv_cache import KVCache
from promptmill_workers.engines.llama.passes import fill, sample, score
from promptmill_workers.engines.llama.sampling import Shape, shape_of
from promptmill_workers.engines.llama.sequence import LlamaSequence
from promptmill_workers.engines.llama.text import LlamaAnswerText, LlamaPromptReader
from promptmill_workers.engines.scheduler import Admission, Computed, Pass

#: Longest that decoding sequences wait while prompts are computed, in seconds; and where a client waits for a text.
#: A pass is not broken off: one more may be under way then.
DECODE_WAITS_S, CLIENT_WAITS_S = 5.0, 0.1

#: Prompt tokens from which on they have passes of their own: fewer ride along with a pass that decodes.
APART_FROM = 128

#: Shared prefixes that are kept at once. Each takes a sequence number and its cells.
PREFIXES = 8


class LlamaBackend:
    """The scheduler's backend over llama.cpp's low-level bindings."""

    def __init__(self, model: LlamaModel, name: str, options: EngineOptions) -> None:
        self.check(options)
        self._model = model
        self._vocabulary = model.vocabulary
        self._prompts = LlamaPromptReader(model)
        room = fit(
            slots=options.slots, cells=options.kv_cells, context=options.context_tokens, needed=options.needed_tokens,
            trained=model.context_trained, cell_bytes=model.cell_bytes(options.kv_type),
            free_bytes=model.free_bytes(), gpu=model.offloaded > 0,
        )  # fmt: skip
        self._context_tokens = room.context
        self._threads = options.threads or _cores()
        self._embedder: Embedder | None = None
        self._context = Context(
            model, cells=room.cells, batch=max(options.batch_tokens, room.slots + PREFIXES), slots=room.slots,
            spare=PREFIXES, threads=self._threads, exact=options.exact, kv_type=options.kv_type,
        )  # fmt: skip
        self._context.warm_up()
        self._tools = Tools(
            ends=self._vocabulary.ends,
            piece=self._vocabulary.piece,
            tokens=self._vocabulary.within,
            text=lambda stops: LlamaAnswerText(self._vocabulary.piece, stops),
            grammars=Grammars(self._vocabulary.constraint_tokenizer, self._vocabulary.size),
        )
        self._kv = KVCache(self._context, range(room.slots, room.slots + PREFIXES), shares=model.has_cells)
        self._free = list(range(room.slots))[::-1]
        #: When a pass last decoded, and whether prompts were computed since.
        self._decoded_at, self._prefilled_since = 0.0, False
        self.most_running = room.slots
        self.info = EngineInfo(
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
    def token_counter(path: Path | None) -> LlamaPromptReader:
        """Raises ModelError."""
        assert path is not None
        return LlamaPromptReader(LlamaModel(path, vocab_only=True))

    @property
    def kv_cells_used(self) -> int:
        return self._kv.used_cells

    def render(self, request: EngineRequest) -> str:
        return self._prompts.render(request)

    def close(self) -> None:
        if self._embedder is not None:
            self._embedder.close()
        self._context.close()
        self._model.close()

    def prepare(self, request: EngineRequest) -> LlamaSequence:
        return LlamaSequence.of(request, self._prompts, self._context_tokens)

    def plan(self, waiting: Sequence[LlamaSequence]) -> Iterable[LlamaSequence]:
        return self._kv.plan(waiting)

    # --- admit -------------------------------------------------------------------------------------------------------

    def admit(self, sequence: LlamaSequence, waiting: Collection[LlamaSequence]) -> Admission:
        sampling = sequence.request.sampling
        if sampling.embedding:
            sequence.answer, sequence.slot = Computed(), self._free.pop()
            return Admission.ADMITTED
        prefix, shared, is_ready = self._kv.prefix_for(sequence, waiting)
        if not is_ready:
            return Admission.LATER
        if not self._kv.make(sequence.cells_beside(shared if prefix else 0), waiting, keep=prefix):
            return Admission.FULL
        if sequence.scored:
            sequence.answer = Computed()
        else:
            sequence.answer = Generation(
                self._tools, sampling, sequence.prompt, sequence.limit, thinks=sequence.thinks
            )  # fmt: skip
        is_simple = sampling.is_greedy and not self._model.offloaded
        sequence.hosted = bool(needs_logits(sampling) or sampling.logprobs or sequence.scored or is_simple)
        shape = None if sequence.hosted else shape_of(sampling)
        sequence.slot = self._slot_for(shape)
        self._kv.begin(sequence, prefix, shared)
        seed = sampling.seed if sampling.seed is not None else random.getrandbits(31)
        self._context.set_sampling(sequence.slot, shape, seed)
        if sampling.logprobs and not sampling.is_greedy:
            self._context.set_aside(sequence.slot, shape_of(sampling), seed)
        return Admission.ADMITTED

    def _slot_for(self, shape: Shape) -> int:
        """A free slot, best one whose sampler has the same shape: another shape costs a new graph."""
        slot = next((each for each in reversed(self._free) if self._context.shape(each) == shape), self._free[-1])
        self._free.remove(slot)
        return slot

    def free(self, sequence: LlamaSequence) -> None:
        self._kv.end(sequence)
        self._free.append(sequence.slot)

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, running: Collection[LlamaSequence], waiting: Collection[LlamaSequence]) -> Pass[LlamaSequence]:
        """One batch: a token of every decoding sequence, or prompt tokens."""
        done: Pass[LlamaSequence] = Pass()
        self._embed([each for each in running if each.request.sampling.embedding], done)
        # Urgent ones are computed first of prompts that do not fit together.
        ordered = sorted(self._kv.running.values(), key=lambda each: not each.request.urgent)
        decode, prefill = self._kinds(ordered)
        batch = fill(
            self._context.batch, ordered, self._kv.prefixes.unfinished, decode=decode, prefill=prefill
        )  # fmt: skip
        tokens = batch.decoded + batch.prefilled
        if not tokens:
            return done
        started = time.monotonic()
        code = self._context.decode()
        seconds = time.monotonic() - started
        if code == NO_ROOM:
            for each in ordered:
                each.output, each.outputs = -1, range(0)
            done.no_room = not self._kv.give_up_prefixes(waiting)
            return done
        batch.settle()
        if batch.decoded:
            self._decoded_at = time.monotonic()
        self._prefilled_since = bool(batch.prefilled)
        done.steps = 1
        # The pass is shared out by tokens.
        done.prefill_tokens += batch.prefilled
        done.prefill_s += seconds * batch.prefilled / tokens
        done.decode_s += seconds * batch.decoded / tokens
        for each in self._kv.running.values():
            self._read(each, done)
        return done

    def _kinds(self, running: Collection[LlamaSequence]) -> tuple[bool, bool]:
        """Whether the pass decodes, and whether it computes prompts.

        Long prompts have passes of their own: each row of attention walks over the cells of all sequences in the pass,
        so decode tokens beside prompts cost a quarter of a run of long prompts.
        """
        waiting = [each for each in running if each.pending and not each.in_prefill]
        prompts = sum(each.last_position - each.done for each in running if each.in_prefill)
        prompts += sum(len(each.tokens) - each.done for each in self._kv.prefixes.unfinished)
        if not waiting or prompts < APART_FROM:
            return True, True
        has_client = any(each.request.stream or each.request.urgent for each in waiting)
        waits_s = CLIENT_WAITS_S if has_client else DECODE_WAITS_S
        late = self._prefilled_since and time.monotonic() - self._decoded_at > waits_s
        return late, not late

    def _read(self, sequence: LlamaSequence, done: Pass[LlamaSequence]) -> None:
        """Take what the pass gave for a sequence."""
        if sequence.scored:
            if (reason := score(self._context, sequence)) is not None:
                done.outcomes.append((sequence, reason))
        elif sequence.output >= 0:
            outcome: FinishReason | RequestError | None
            try:
                outcome = sample(self._context, sequence)
            except RequestError as problem:
                outcome = problem
            done.decode_tokens += len(sequence.pending)
            done.outcomes.append((sequence, outcome))

    def _embed(self, wanted: Sequence[LlamaSequence], done: Pass[LlamaSequence]) -> None:
        """One pass over some of those that want vectors. Raises ModelError when there is no memory for it."""
        if not wanted:
            return
        started = time.monotonic()
        if self._embedder is None:
            self._embedder = Embedder(self._model, tokens=self._context_tokens, threads=self._threads)
        vectors = self._embedder.embed([each.prompt for each in wanted])
        for each, vector in zip(wanted, vectors, strict=False):
            each.answer = Computed(extras=Extras(embedding=vector))
            done.outcomes.append((each, FinishReason.STOP))
            done.prefill_tokens += each.prompt_tokens
        done.steps = 1
        done.prefill_s += time.monotonic() - started


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
