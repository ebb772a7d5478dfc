"""Requests to prompt tokens, and tokens back to the text of an answer, by the model's own vocabulary."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from promptmill.errors import RequestError
from promptmill.tasks.sampling import refuse_unknown_tokens
from promptmill.types import ErrorClass, SamplingParams
from promptmill_workers.engines.chat_template import ANSWERED, PLAIN, ChatTemplate, after_answer
from promptmill_workers.engines.contract import EngineRequest
from promptmill_workers.engines.llama.batch import Tokens
from promptmill_workers.engines.llama.binding import LlamaModel, Vocabulary
from promptmill_workers.engines.prompt_pieces import Controls, Piece, begins_twice, pieces_of, text_of

#: No prompt has more bytes a token on average. A longer text cannot fit, and is not worth seconds of splitting it.
MOST_BYTES_PER_TOKEN = 256


class PromptOverflow(RequestError):
    """The prompt leaves no room for an answer."""

    error_class = ErrorClass.CONTEXT_OVERFLOW


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine computes it. The last ``scored`` tokens are a continuation that is to be scored."""

    tokens: Tokens
    #: The model begins with its reasoning.
    thinks: bool = False
    scored: int = 0


class PromptReader:
    """Requests to prompt tokens, by the model's own chat template and vocabulary."""

    def __init__(self, model: LlamaModel) -> None:
        self._vocabulary: Vocabulary = model.vocabulary
        self._source, self._tool_source = model.chat_template, model.tool_template

    def pieces(self, request: EngineRequest) -> list[Piece]:
        """Raises RequestError."""
        return self._opened(request)[0]

    def parts(self, request: EngineRequest) -> list[tuple[str, str]]:
        """The prompt in parts, as ``Controls.parts``. Raises RequestError."""
        return self._controls.parts(self.pieces(request))

    def render(self, request: EngineRequest) -> str:
        """Raises RequestError."""
        return text_of(self.pieces(request))

    def has_two_starts(self, request: EngineRequest) -> bool:
        """Whether the prompt begins with BOS twice. Raises RequestError."""
        return begins_twice(self.pieces(request), self._vocabulary.bos)

    def _opened(self, request: EngineRequest) -> tuple[list[Piece], bool]:
        return pieces_of(request, self._controls, self._chat_template)

    @cached_property
    def _controls(self) -> Controls:
        return Controls(self._vocabulary.control_texts(), self._vocabulary.user_defined_texts())

    def _chat_template(self, sampling: SamplingParams) -> ChatTemplate:
        return self._template if sampling.tools is None or self._tool_source is None else self._tool_template

    @cached_property
    def _template(self) -> ChatTemplate:
        """Raises RequestError."""
        if self._source is None:
            raise RequestError("the model has no chat template: send raw prompts (/v1/completions lines)")
        return ChatTemplate(self._source, self._vocabulary.bos, self._vocabulary.eos)

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        """The one that some models have for tools alone. Raises RequestError."""
        return ChatTemplate(self._tool_source or "", self._vocabulary.bos, self._vocabulary.eos)

    @cached_property
    def end(self) -> int | None:
        """The token that ends an answer: what the chat template writes there, else what the vocabulary names."""
        try:
            after = after_answer(self._template.write(ANSWERED, None, PLAIN, ask=False))
        except RequestError:
            return self._vocabulary.end
        found = self._vocabulary.tokens(after, parse_special=True, start=False).tolist()
        return next((each for each in found if self._vocabulary.ends(each)), self._vocabulary.end)

    def tokens(self, request: EngineRequest) -> Tokens:
        """Raises RequestError, also for a prompt without a single token."""
        return self._tokens(self.pieces(request), request)

    def prompt(self, request: EngineRequest, context_tokens: int) -> Prompt:
        """The prompt, with room for one token of an answer. Raises RequestError."""
        refuse_unknown_tokens(request.sampling, self._vocabulary.size)
        pieces, thinks = self._opened(request)
        size = sum(len(each.text) for each in pieces)
        if size > context_tokens * MOST_BYTES_PER_TOKEN:
            raise PromptOverflow(f"the prompt has {size:,} characters, the context {context_tokens:,} tokens")
        found, scored = self._tokens(pieces, request), 0
        if request.continuation is not None:
            # Apart from the prompt, so that every continuation follows the same tokens.
            more = self._after(found, [Piece(request.continuation, plain=True)])[len(found) :]
            if not len(more):
                raise RequestError("a continuation has no tokens")
            if request.closed and self.end is not None:
                more = np.append(more, np.int32(self.end))
            found, scored = np.concatenate([found, more]), len(more)
        if len(found) >= context_tokens:
            raise PromptOverflow(f"the prompt has {len(found):,} tokens, the context {context_tokens:,}")
        return Prompt(found, thinks, scored)

    def _after(self, found: Tokens, pieces: Sequence[Piece]) -> Tokens:
        """``found`` and the tokens of the pieces after it."""
        for piece in self._controls.apart(pieces):
            # The whole prompt in one go, but for pieces that must not be what they spell.
            more = (
                self._vocabulary.inner(piece.text, parse_special=not piece.plain, after=int(found[-1]))
                if len(found)
                else self._vocabulary.tokens(piece.text, parse_special=not piece.plain)
            )
            found = np.concatenate([found, more])
        return found

    def _tokens(self, pieces: Sequence[Piece], request: EngineRequest) -> Tokens:
        found = self._after(np.zeros(0, dtype=np.int32), pieces)
        if not len(found) and not text_of(pieces) and request.is_scored:
            # Nothing but what every text begins with: a text is scored from there.
            found = np.array(self._vocabulary.start, dtype=np.int32)
        if not len(found):
            raise RequestError("the prompt has no tokens")
        return found


class LlamaAnswerText:
    """The text of one answer, token by token. A stop text may begin and end inside tokens, and inside a character."""

    __slots__ = ("_bytes", "_cut", "_longest", "_piece", "_shown", "_stops")

    def __init__(self, piece: Callable[[int], bytes], stops: tuple[str, ...]) -> None:
        self._piece = piece
        self._bytes = bytearray()
        self._stops = [stop.encode(errors="replace") for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._shown = 0
        self._cut = False

    def add(self, token: int) -> bool:
        """Take the next token; True when a stop text is complete, which is then cut off."""
        piece = self._piece(token)
        seen = len(self._bytes)
        self._bytes += piece
        if not self._stops or not piece:
            return False
        start = max(0, seen - self._longest + 1)
        found = [at for stop in self._stops if (at := self._bytes.find(stop, start)) >= 0]
        if found:
            del self._bytes[min(found) :]
            self._cut = True
        return bool(found)

    def finish(self) -> tuple[str, bool]:
        """The text, without a character that was not finished; bytes that are none become U+FFFD."""
        return getincrementaldecoder("utf-8")("replace").decode(bytes(self._bytes), self._cut), False

    def fresh(self) -> str:
        """What has come since, without what may be the start of a stop text or of a character."""
        end = len(self._bytes)
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._bytes)), 0, -1):
                if self._bytes.endswith(stop[:size]):
                    end = min(end, len(self._bytes) - size)
                    break
        # A character has at most four bytes: cut one that lacks some.
        for back in range(1, min(4, end - self._shown) + 1):
            lead = self._bytes[end - back]
            if lead >= 0xC0:
                end -= back if back < (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4) else 0
                break
            if lead < 0x80:
                break
        if end <= self._shown:
            return ""
        text = self._bytes[self._shown : end].decode("utf-8", errors="replace")
        self._shown = end
        return text


class LlamaTokenCounter:
    """The vocabulary of a GGUF without its weights."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._prompts = PromptReader(model)

    @property
    def context_tokens(self) -> int:
        return self._model.context_trained

    @property
    def vocabulary(self) -> int:
        return self._model.vocabulary.size

    def count(self, request: EngineRequest) -> int:
        return len(self._prompts.tokens(request))

    def render(self, request: EngineRequest) -> str:
        return self._prompts.render(request)

    def parts(self, request: EngineRequest) -> list[tuple[str, str]]:
        return self._prompts.parts(request)

    def has_two_starts(self, request: EngineRequest) -> bool:
        return self._prompts.has_two_starts(request)
