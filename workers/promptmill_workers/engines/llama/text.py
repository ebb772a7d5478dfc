"""Requests to prompt tokens, and tokens back to the text of an answer, by the model's own vocabulary."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable
from functools import cached_property

from promptmill.errors import RequestError
from promptmill.types import SamplingParams
from promptmill_workers.engines.chat_template import ANSWERED, PLAIN, ChatTemplate, after_answer
from promptmill_workers.engines.llama.binding import LlamaModel
from promptmill_workers.engines.prefix_plan import Tokens
from promptmill_workers.engines.prompt_pieces import Controls, Piece
from promptmill_workers.engines.prompts import PromptReader


class LlamaPromptReader(PromptReader):
    """Reads by the chat template and the vocabulary in a GGUF; its weights are not needed."""

    def __init__(self, model: LlamaModel) -> None:
        self._words = model.vocabulary
        self._source, self._tool_source = model.chat_template, model.tool_template
        self.context_tokens, self.vocabulary = model.context_trained, self._words.size
        self.bos, self.start = self._words.bos, self._words.start

    @cached_property
    def _controls(self) -> Controls:  # type: ignore[override]
        return Controls(self._words.control_texts(), self._words.user_defined_texts())

    def _chat_template(self, sampling: SamplingParams) -> ChatTemplate:
        return self._template if sampling.tools is None or self._tool_source is None else self._tool_template

    @cached_property
    def _template(self) -> ChatTemplate:
        """Raises RequestError."""
        if self._source is None:
            raise RequestError("the model has no chat template: send raw prompts (/v1/completions lines)")
        return ChatTemplate(self._source, self._words.bos, self._words.eos)

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        """The one that some models have for tools alone. Raises RequestError."""
        return ChatTemplate(self._tool_source or "", self._words.bos, self._words.eos)

    @cached_property
    def end(self) -> int | None:  # type: ignore[override]
        """What the chat template writes after an answer, else what the vocabulary names."""
        try:
            after = after_answer(self._template.write(ANSWERED, None, PLAIN, ask=False))
        except RequestError:
            return self._words.end
        found = self._words.tokens(after, parse_special=True, start=False).tolist()
        return next((each for each in found if self._words.ends(each)), self._words.end)

    def _piece_tokens(self, piece: Piece, after: int | None) -> Tokens:
        if after is None:
            return self._words.tokens(piece.text, parse_special=not piece.plain)
        return self._words.inner(piece.text, parse_special=not piece.plain, after=after)


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
