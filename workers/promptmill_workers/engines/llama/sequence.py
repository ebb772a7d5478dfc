"""A request on its way through llama.cpp: what of it is in the KV cache, and what the next pass is to compute."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from promptmill_workers.engines.llama.prefixes import LlamaPrefix
from promptmill_workers.engines.prefix_plan import Tokens
from promptmill_workers.engines.prompts import TokenSequence


@dataclass(slots=True, eq=False)
class LlamaSequence(TokenSequence):
    """What follows is known once it has a slot."""

    slot: int = field(default=-1, init=False)
    prefix: LlamaPrefix | None = field(default=None, init=False)
    #: The first tokens of the prompt, whose cells are those of the prefix.
    prefix_tokens: int = field(default=0, init=False)
    #: Its tokens that are in the KV cache.
    done: int = field(default=0, init=False)
    #: Its next token is drawn on the host.
    hosted: bool = field(default=False, init=False)
    #: Tokens of the answer that are not computed yet: the one drawn last, and those forced after it.
    pending: list[int] = field(default_factory=list, init=False)
    #: Batch index of the output that this step samples; -1 when it asks for none.
    output: int = field(default=-1, init=False)
    #: For a continuation: the outputs of this step, as batch indices, and what they gave so far.
    outputs: range = field(default=range(0), init=False)
    logprob: float = field(default=0.0, init=False)
    likeliest: bool = field(default=True, init=False)

    @property
    def last_position(self) -> int:
        """Tokens that a prefill computes. Nothing follows the last token of a continuation: it is not computed."""
        return len(self.prompt) - (1 if self.scored else 0)

    @property
    def in_prefill(self) -> bool:
        return self.done < self.last_position

    @property
    def cells(self) -> int:
        """KV cells that are set aside for it. A prefix's are the prefix's; a neighbour's become its when that ends."""
        return self.cells_beside(self.prefix_tokens)

    def cells_beside(self, prefix_tokens: int) -> int:
        """KV cells that it needs when a prefix holds so many of its first tokens."""
        return len(self.prompt) - prefix_tokens + self.limit

    def work(self) -> Tokens:
        """The tokens to be computed next."""
        if self.in_prefill:
            return self.prompt[self.done : self.last_position]
        return np.array(self.pending, dtype=np.int32)
