"""Requests to prompt tokens, and tokens back to the text of an answer, by the model's own vocabulary."""

from __future__ import annotations

from promptmill.errors import RequestError
from promptmill.types import ErrorClass
from promptmill_workers.engines.chat_template import ChatTemplate
from promptmill_workers.engines.contract import EngineRequest
from promptmill_workers.engines.llama_binding import Model, Tokens, Vocabulary

#: No prompt has more bytes a token on average. A longer text cannot fit, and is not worth seconds of splitting it.
MOST_BYTES_PER_TOKEN = 256


class PromptTooLong(RequestError):
    """The prompt leaves no room for an answer."""

    error_class = ErrorClass.CONTEXT_OVERFLOW


class PromptReader:
    """Requests to prompt tokens, by the model's own chat template and vocabulary."""

    def __init__(self, model: Model) -> None:
        self._vocabulary: Vocabulary = model.vocabulary
        self._source = model.chat_template
        self._template: ChatTemplate | None = None

    def render(self, request: EngineRequest) -> str:
        """Raises RequestError."""
        if request.messages is None:
            return request.prompt or ""
        if self._template is None:
            if self._source is None:
                raise RequestError("the model has no chat template: send raw prompts (/v1/completions lines)")
            self._template = ChatTemplate(self._source, self._vocabulary.bos, self._vocabulary.eos)
        return self._template.render(request.messages)

    def tokens(self, request: EngineRequest) -> Tokens:
        """Raises RequestError, also for a prompt without a single token."""
        return self._tokens(self.render(request), request)

    def fitting_tokens(self, request: EngineRequest, context_tokens: int) -> Tokens:
        """The prompt, with room for one token of an answer. Raises RequestError."""
        text = self.render(request)
        if len(text) > context_tokens * MOST_BYTES_PER_TOKEN:
            raise PromptTooLong(f"the prompt has {len(text):,} characters, the context {context_tokens:,} tokens")
        found = self._tokens(text, request)
        if len(found) >= context_tokens:
            raise PromptTooLong(f"the prompt has {len(found):,} tokens, the context {context_tokens:,}")
        return found

    def _tokens(self, text: str, request: EngineRequest) -> Tokens:
        found = self._vocabulary.tokens(text, parse_special=request.messages is not None)
        if not len(found):
            raise RequestError("the prompt has no tokens")
        return found


class AnswerText:
    """The bytes of an answer, up to its first stop string. A token may be part of a character."""

    __slots__ = ("_bytes", "_longest", "_stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._bytes = bytearray()
        self._stops = [stop.encode(errors="replace") for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)

    def append(self, piece: bytes) -> bool:
        """Add a token's bytes; True when they completed a stop string, which is then cut off."""
        seen = len(self._bytes)
        self._bytes += piece
        if not self._stops or not piece:
            return False
        start = max(0, seen - self._longest + 1)
        found = [at for stop in self._stops if (at := self._bytes.find(stop, start)) >= 0]
        if found:
            del self._bytes[min(found) :]
        return bool(found)

    def __str__(self) -> str:
        """The text; a character that was not finished becomes U+FFFD."""
        return self._bytes.decode("utf-8", errors="replace")


class LlamaTokenCounter:
    """The vocabulary of a GGUF without its weights."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._prompts = PromptReader(model)

    @property
    def context_tokens(self) -> int:
        return self._model.context_trained

    def count(self, request: EngineRequest) -> int:
        return len(self._prompts.tokens(request))

    def render(self, request: EngineRequest) -> str:
        return self._prompts.render(request)
