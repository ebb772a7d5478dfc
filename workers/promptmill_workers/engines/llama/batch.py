"""llama.cpp's batch over numpy arrays of ours: one attribute write per token would cost more than small models."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from promptmill_workers.engines.prefix_plan import Tokens


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


class Batch:
    """The tokens of one forward pass, each of one sequence."""

    def __init__(self, size: int) -> None:
        """``size``: most tokens."""
        self.size = size
        self._token, self._pos, self._sequence = (np.empty(size, dtype=np.int32) for _ in range(3))
        self._logits = np.zeros(size, dtype=np.int8)
        self._counts = np.ones(size, dtype=np.int32)
        # Each token's list of sequences is one cell of the array of sequences.
        self._lists = self._sequence.ctypes.data + 4 * np.arange(size, dtype=np.uintp)
        self._struct = llama_cpp.llama_batch(
            n_tokens=0, embd=None, token=_pointer(self._token, llama_cpp.llama_token),
            pos=_pointer(self._pos, llama_cpp.llama_pos), n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._lists, ctypes.POINTER(llama_cpp.llama_seq_id)),
            logits=_pointer(self._logits, ctypes.c_int8),
        )  # fmt: skip
        self._filled = 0

    def clear(self) -> None:
        self._filled = 0

    def put(self, sequence: int, position: int, tokens: Tokens | Sequence[int], *, wanted: int) -> int:
        """Add tokens of one sequence from ``position`` on, outputs ``wanted`` of the last so many of them.

        Returns the batch index of the last one.
        """
        start, end = self._filled, self._filled + len(tokens)
        self._token[start:end] = tokens
        self._pos[start:end] = np.arange(position, position + len(tokens))
        self._sequence[start:end] = sequence
        self._logits[start:end] = 0
        if wanted:
            self._logits[end - wanted : end] = 1
        self._filled = end
        return end - 1

    def put_outputs(self, slots: Sequence[int], positions: Sequence[int], tokens: Sequence[int]) -> range:
        """Add one token of each of several sequences, and ask for an output of each; returns their batch indices."""
        start, end = self._filled, self._filled + len(slots)
        self._token[start:end] = tokens
        self._pos[start:end] = positions
        self._sequence[start:end] = slots
        self._logits[start:end] = 1
        self._filled = end
        return range(start, end)

    def struct(self) -> Any:
        """The batch as llama.cpp takes it."""
        self._struct.n_tokens = self._filled
        return self._struct
