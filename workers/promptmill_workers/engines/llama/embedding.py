"""Vectors of prompts by llama.cpp, in a context of their own beside the one that generates."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import llama_cpp
import numpy as np

from promptmill.errors import ModelError
from promptmill.types import Extras, FinishReason, Usage
from promptmill_workers.engines.contract import EngineRequest, Event, Finished, RequestKey
from promptmill_workers.engines.llama.batch import Batch, Tokens
from promptmill_workers.engines.llama.binding import LlamaModel

#: Prompts of one pass.
AT_ONCE = 16


class Embedder:
    """Embeds prompts by the model's own pooling; by the mean of the last layer where it names none."""

    def __init__(self, model: LlamaModel, *, tokens: int, threads: int) -> None:
        """``tokens``: most of one pass, and of one prompt. Raises ModelError when memory does not suffice."""
        params = llama_cpp.llama_context_default_params()
        # A prompt has to be seen whole: no model pools over passes.
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_seq_max = AT_ONCE
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.kv_unified = True
        params.no_perf = True
        self._handle = llama_cpp.llama_init_from_model(model.handle, params)
        if self._handle and llama_cpp.llama_pooling_type(self._handle) == llama_cpp.LLAMA_POOLING_TYPE_NONE:
            llama_cpp.llama_free(self._handle)
            params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_MEAN
            self._handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise ModelError("no memory for embeddings", hint="Give fewer --slots or a smaller --context.")
        self._size = int(llama_cpp.llama_model_n_embd(model.handle))
        self._batch = Batch(tokens)

    def embed(self, prompts: Sequence[Tokens]) -> list[list[float]]:
        """A vector of length 1 for each prompt; together they are at most AT_ONCE and fit one pass."""
        memory = llama_cpp.llama_get_memory(self._handle)
        if memory:
            llama_cpp.llama_memory_clear(memory, True)
        self._batch.clear()
        for sequence, prompt in enumerate(prompts):
            self._batch.put(sequence, 0, prompt, wanted=len(prompt))
        code = int(llama_cpp.llama_decode(self._handle, self._batch.struct()))
        if code:
            raise RuntimeError(f"llama_decode returned {code} for embeddings")
        return [self._vector(sequence) for sequence in range(len(prompts))]

    def _vector(self, sequence: int) -> list[float]:
        pointer = llama_cpp.llama_get_embeddings_seq(self._handle, sequence)
        vector = np.ctypeslib.as_array(pointer, shape=(self._size,)).astype(np.float64)
        return [float(each) for each in (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)]

    def close(self) -> None:
        if self._handle:
            llama_cpp.llama_free(self._handle)
            self._handle = None


class Embeddings:
    """Requests for vectors. They take no slot: a pass over some of them comes before each step."""

    def __init__(self, model: LlamaModel, *, tokens: int, threads: int) -> None:
        self._model = model
        self._tokens = tokens
        self._threads = threads
        self._waiting: deque[tuple[EngineRequest, Tokens]] = deque()
        self._embedder: Embedder | None = None
        self._work = (0, 0.0)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def requests(self) -> list[EngineRequest]:
        return [request for request, _ in self._waiting]

    def add(self, request: EngineRequest, prompt: Tokens) -> None:
        self._waiting.append((request, prompt))

    def cancel(self, key: RequestKey) -> None:
        if self._waiting:
            self._waiting = deque(each for each in self._waiting if each[0].key != key)

    def step(self, now: float) -> list[Event]:
        """One pass. Raises ModelError when there is no memory for a second context."""
        if not self._waiting:
            return []
        if self._embedder is None:
            self._embedder = Embedder(self._model, tokens=self._tokens, threads=self._threads)
        taken: list[tuple[EngineRequest, Tokens]] = []
        room = self._tokens
        while self._waiting and len(taken) < AT_ONCE and len(self._waiting[0][1]) <= room:
            taken.append(self._waiting.popleft())
            room -= len(taken[-1][1])
        vectors = self._embedder.embed([prompt for _, prompt in taken])
        end = time.monotonic()
        self._work = (self._tokens - room, end - now)
        return [
            Finished(
                request.key, "", FinishReason.STOP, Usage(len(prompt), 0, 0), now, end, end, Extras(embedding=vector)
            )
            for (request, prompt), vector in zip(taken, vectors, strict=True)
        ]

    def take_work(self) -> tuple[int, float]:
        """Tokens and seconds of the last pass, once."""
        taken, self._work = self._work, (0, 0.0)
        return taken

    def close(self) -> None:
        if self._embedder is not None:
            self._embedder.close()
