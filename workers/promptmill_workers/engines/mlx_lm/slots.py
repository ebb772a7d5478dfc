"""Requests on their way through the MLX engine: waiting, then running in a slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from promptmill.types import Usage
from promptmill_workers.engines.answer import Generation
from promptmill_workers.engines.contract import EngineRequest
from promptmill_workers.engines.prefix_plan import Tokens

if TYPE_CHECKING:
    from promptmill_workers.engines.mlx_lm.binding import HostedSampler


class TooLong(Exception):
    """A prompt that leaves no room for an answer."""


@dataclass(slots=True, eq=False)
class MlxWaiting:
    """A request that is tokenised and has no slot. ``shared`` tokens of its prompt are planned to be computed once."""

    request: EngineRequest
    prompt: Tokens
    limit: int
    thinks: bool = False
    #: The last tokens of the prompt are a continuation to be scored.
    scored: int = 0
    shared: int = 0

    @property
    def owner(self) -> str:
        return self.request.sharing.owner

    @property
    def question(self) -> Tokens:
        """The prompt without a continuation."""
        return self.prompt[: len(self.prompt) - self.scored]

    @property
    def slotless(self) -> bool:
        """It is computed in one go: nothing is generated."""
        return self.scored > 0 or self.request.sampling.embedding

    @property
    def cells(self) -> int:
        """KV cells that are set aside for it. A shared prefix saves time and no memory: each row has its copy."""
        return len(self.prompt) + self.limit


@dataclass(slots=True, eq=False)
class MlxRunning:
    """A request in a slot."""

    waiting: MlxWaiting
    answer: Generation
    #: Draws its tokens, and has seen them before they arrive here.
    hosted: HostedSampler | None
    cached: int
    admitted_at: float
    first_token_at: float | None = None
    #: Tokens that have arrived.
    count: int = 0

    @property
    def request(self) -> EngineRequest:
        return self.waiting.request

    @property
    def usage(self) -> Usage:
        return Usage(len(self.waiting.prompt), self.cached, self.count, min(self.count, self.answer.reasoning_tokens))

    def is_late(self, now: float) -> bool:
        limit = self.request.sampling.timeout_s
        return limit is not None and now - self.admitted_at >= limit
