"""Vectors of prompts by llama.cpp, in a context of their own beside the one that generates."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp
import numpy as np

from promptmill.errors import ModelError
from promptmill_workers.engines.llama.batch import Batch
from promptmill_workers.engines.llama.binding import LlamaModel
from promptmill_workers.engines.prefix_plan import Tokens

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
        self._tokens = tokens
        self._size = int(llama_cpp.llama_model_n_embd(model.handle))
        self._batch = Batch(tokens)

    def embed(self, prompts: Sequence[Tokens]) -> list[list[float]]:
        """A vector of length 1 for each of the first prompts: as many as fit one pass."""
        ends = np.cumsum([len(each) for each in prompts[:AT_ONCE]])
        prompts = prompts[: int((ends <= self._tokens).sum())]
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
