"""Requests on their way through the llama.cpp engine: waiting, then running in a slot."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from promptmill.types import Usage
from promptmill_workers.engines.answer import Generation
from promptmill_workers.engines.contract import EngineRequest
from promptmill_workers.engines.llama.batch import Tokens
from promptmill_workers.engines.llama.prefixes import LlamaPrefix
from promptmill_workers.engines.llama.text import Prompt


@dataclass(slots=True, eq=False)
class LlamaWaiting:
    """A request that is tokenised and has no slot. ``shared`` tokens of its prompt are planned to be computed once."""

    request: EngineRequest
    prompt: Tokens
    limit: int
    thinks: bool = False
    #: The last tokens of the prompt are a continuation to be scored.
    scored: int = 0
    shared: int = 0

    @classmethod
    def of(cls, request: EngineRequest, prompt: Prompt, context_tokens: int) -> LlamaWaiting:
        room = context_tokens - len(prompt.tokens)
        limit = 0 if prompt.scored else min(request.sampling.max_tokens, room)
        return cls(request, prompt.tokens, limit, prompt.thinks, prompt.scored)

    @property
    def owner(self) -> str:
        return self.request.sharing.owner

    @property
    def question(self) -> Tokens:
        """The prompt without a continuation."""
        return self.prompt[: len(self.prompt) - self.scored]

    @property
    def head(self) -> Tokens:
        """What may be shared with others: all but the tokens whose logits are needed."""
        return self.question[:-1]


@dataclass(slots=True, eq=False)
class LlamaRunning:
    """A request in a slot. ``done`` of its tokens are in the KV cache, the first ``shared`` of them a prefix's.

    ``cached`` of its prompt tokens were not computed for this request.
    """

    slot: int
    waiting: LlamaWaiting
    prefix: LlamaPrefix | None
    shared: int
    cached: int
    done: int
    admitted_at: float
    answer: Generation
    #: Its next token is drawn on the host.
    hosted: bool = False
    first_token_at: float | None = None
    #: Tokens of the answer that are not computed yet: the one drawn last, and those forced after it.
    pending: list[int] = field(default_factory=list)
    #: Batch index of the output that this step samples; -1 when it asks for none.
    output: int = -1
    #: Of a continuation: the outputs of this step, as batch indices, and what they gave so far.
    outputs: range = range(0)
    logprob: float = 0.0
    likeliest: bool = True

    @property
    def request(self) -> EngineRequest:
        return self.waiting.request

    @property
    def last_position(self) -> int:
        """Tokens that a prefill computes. Nothing follows the last token of a continuation: it is not computed."""
        return len(self.waiting.prompt) - (1 if self.waiting.scored else 0)

    @property
    def in_prefill(self) -> bool:
        return self.done < self.last_position

    @property
    def cells(self) -> int:
        """KV cells that are set aside for it. A prefix's are the prefix's; a neighbour's become its when that ends."""
        return cells_of(self.waiting, self.shared)

    @property
    def usage(self) -> Usage:
        answer, scored = self.answer, self.waiting.scored
        return Usage(len(self.waiting.prompt) - scored, self.cached, answer.count, answer.reasoning_tokens)

    def work(self) -> Tokens:
        """The tokens to be computed next."""
        if self.in_prefill:
            return self.waiting.prompt[self.done : self.last_position]
        return np.array(self.pending, dtype=np.int32)


def cells_of(waiting: LlamaWaiting, shared: int) -> int:
    """KV cells of a request of which a prefix holds the first ``shared``."""
    return len(waiting.prompt) - shared + waiting.limit
