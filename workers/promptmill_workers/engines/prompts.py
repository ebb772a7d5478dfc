"""Requests to prompt tokens, for the engines that compute here."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn, Self

import numpy as np

from promptmill.errors import RequestError
from promptmill.tasks.sampling import PromptTooLong, refuse_unknown_tokens
from promptmill.types import SamplingParams
from promptmill_workers.engines.answer import Generation
from promptmill_workers.engines.contract import EngineRequest
from promptmill_workers.engines.prefix_plan import Tokens
from promptmill_workers.engines.prompt_pieces import (
    Controls,
    MarkedTemplate,
    Piece,
    begins_twice,
    pieces_of,
    text_of,
)
from promptmill_workers.engines.scheduler import Computed, EngineSequence

#: No prompt has more characters a token on average. A longer text cannot fit, and is not worth seconds of splitting it.
MOST_CHARACTERS_PER_TOKEN = 256


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as an engine computes it. The last ``scored`` tokens are a continuation that is to be scored."""

    tokens: Tokens
    #: The model begins with its reasoning.
    thinks: bool = False
    scored: int = 0


#: Seconds that a chat template may take: one that never ends must not hold up the requests of others.
RENDER_S = 10.0


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Ends what takes longer, by a signal: where an engine runs, in the main thread of its process.

    Raises RequestError. Elsewhere, such as in a thread of a test, it has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise RequestError(f"the model's chat template takes more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


class PromptReader(ABC):
    """Requests to prompt tokens, by a model's own chat template and vocabulary. It is the model's ``TokenCounter``."""

    #: What the model was trained for.
    context_tokens: int
    #: Tokens that the model has.
    vocabulary: int
    #: The text of the token that a prompt begins with; empty where there is none.
    bos: str
    #: The token that a text begins after: BOS, else EOS, which ended the text before it in training.
    start: list[int]
    #: The token that ends an answer.
    end: int | None
    _controls: Controls

    @abstractmethod
    def _chat_template(self, sampling: SamplingParams) -> MarkedTemplate:
        """Raises RequestError for a model that has none."""

    @abstractmethod
    def _piece_tokens(self, piece: Piece, after: int | None) -> Tokens:
        """Tokens of a piece ``after`` this token; None: at the start of a prompt."""

    def _framed(self, tokens: Tokens) -> Tokens:
        """The tokens of a raw prompt with what the model wants around them."""
        return tokens

    def opened(self, request: EngineRequest) -> tuple[list[Piece], bool]:
        """The prompt, and whether the model begins with its reasoning after it. Raises RequestError."""
        with _bounded(RENDER_S):
            return pieces_of(request, self._controls, self._chat_template)

    def render(self, request: EngineRequest) -> str:
        """Raises RequestError."""
        return text_of(self.opened(request)[0])

    def parts(self, request: EngineRequest) -> list[tuple[str, str]]:
        """The prompt in parts, as ``Controls.parts``. Raises RequestError."""
        return self._controls.parts(self.opened(request)[0])

    def has_two_starts(self, request: EngineRequest) -> bool:
        """Whether the prompt begins with BOS twice. Raises RequestError."""
        return begins_twice(self.opened(request)[0], self.bos)

    def count(self, request: EngineRequest) -> int:
        """Raises RequestError."""
        return len(self.tokens(request))

    def tokens(self, request: EngineRequest) -> Tokens:
        """Raises RequestError, also for a prompt without a single token."""
        return self._tokens(self.opened(request)[0], request)

    def prompt(self, request: EngineRequest, context_tokens: int) -> Prompt:
        """The prompt, with room for one token of an answer. Raises RequestError."""
        refuse_unknown_tokens(request.sampling, self.vocabulary)
        pieces, thinks = self.opened(request)
        size = sum(len(each.text) for each in pieces)
        if size > context_tokens * MOST_CHARACTERS_PER_TOKEN:
            raise PromptTooLong(f"the prompt has {size:,} characters, the context {context_tokens:,} tokens")
        found, scored = self._tokens(pieces, request), 0
        if request.continuation is not None:
            # Apart from the prompt, so that every continuation follows the same tokens.
            more = self.continuation(request.continuation, closed=request.closed, after=int(found[-1]))
            found, scored = np.concatenate([found, more]), len(more)
        if len(found) >= context_tokens:
            raise PromptTooLong(f"the prompt has {len(found):,} tokens, the context {context_tokens:,}")
        return Prompt(found, thinks, scored)

    def continuation(self, text: str, *, closed: bool, after: int) -> Tokens:
        """Tokens of a text that follows a prompt, which ends with the token ``after``; ``closed``: and of the end of
        the answer. Raises RequestError."""
        found = self._encoded([Piece(text, plain=True)], after)
        if not len(found):
            raise RequestError("a continuation has no tokens")
        return np.append(found, np.int32(self.end)) if closed and self.end is not None else found

    def _tokens(self, pieces: Sequence[Piece], request: EngineRequest) -> Tokens:
        found = self._encoded(pieces)
        if request.messages is None:
            found = self._framed(found)
        if not len(found) and not text_of(pieces) and request.is_scored:
            # Nothing but what every text begins with: a text is scored from there.
            found = np.array(self.start, dtype=np.int32)
        if not len(found):
            raise RequestError("the prompt has no tokens")
        return found

    def _encoded(self, pieces: Iterable[Piece], after: int | None = None) -> Tokens:
        """The whole prompt in one go, but for pieces that must not be what they spell."""
        found = np.zeros(0, dtype=np.int32)
        for piece in self._controls.apart(pieces):
            found = np.concatenate([found, self._piece_tokens(piece, int(found[-1]) if len(found) else after)])
        return found


@dataclass(slots=True, eq=False)
class TokenSequence(EngineSequence):
    """A sequence of a model that computes here: its prompt as token ids."""

    prompt: Tokens
    #: Most tokens of the answer.
    limit: int
    #: The model begins with its reasoning.
    thinks: bool = False
    #: The last tokens of the prompt are a continuation to be scored.
    scored: int = 0
    #: Prompt tokens that are planned to be computed once for several sequences.
    shared: int = field(default=0, init=False)
    answer: Generation | Computed = field(init=False)

    @classmethod
    def of(cls, request: EngineRequest, reader: PromptReader, context_tokens: int) -> Self:
        """Raises RequestError."""
        prompt = reader.prompt(request, context_tokens)
        size, scored = len(prompt.tokens), prompt.scored
        is_computed = scored or request.sampling.embedding
        limit = 0 if is_computed else max(1, min(request.sampling.max_tokens, context_tokens - size))
        return cls(request, size - scored, prompt.tokens, limit, prompt.thinks, scored)

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

    @property
    def is_generated(self) -> bool:
        """Whether its answer is generated token by token, and not computed in one go."""
        return not (self.scored or self.request.sampling.embedding)
