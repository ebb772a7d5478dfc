"""Text to token ids and back, by llama.cpp's own vocabulary of a model."""

from __future__ import annotations

import ctypes
import warnings
from typing import Any

import llama_cpp
import numpy as np

from promptmill_workers.engines.answer import END_OF_THINK, THINK
from promptmill_workers.engines.prefix_plan import Tokens

#: In the place of a token of which only is known that it is none of the special ones.
NO_TOKEN = -1

#: Attributes of the tokens that are read as such only where special tokens are parsed, and of those that split a text.
PARSED = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
SPECIAL = PARSED | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED


class Vocabulary:
    """Text to token ids and back."""

    def __init__(self, model: Any) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._pieces: dict[int, bytes] = {}
        self._marks: set[int] = set()
        self._ends: dict[int, bool] = {}
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))
        end = int(llama_cpp.llama_vocab_eot(self._vocab))
        end = end if end >= 0 else int(llama_cpp.llama_vocab_eos(self._vocab))
        #: What ends a turn; None where the model has no such token.
        self.end = end if end >= 0 else None
        bos = int(llama_cpp.llama_vocab_bos(self._vocab))
        eos = int(llama_cpp.llama_vocab_eos(self._vocab))
        #: The token that a text begins after: BOS, else EOS, which ended the text before it in training.
        self.start = [each for each in (bos, eos) if each >= 0][:1]
        self.bos = self._text(llama_cpp.llama_vocab_bos(self._vocab))
        self.eos = self._text(llama_cpp.llama_vocab_eos(self._vocab))
        self._buffer = (llama_cpp.llama_token * 4096)()
        self.size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        #: Reasoning marks that are tokens of their own: they belong to the text of an answer, control tokens or not.
        self._marks = {ids[0] for mark in (THINK, END_OF_THINK) if len(ids := self._special(mark)) == 1}
        self._lead = self._space_eater()

    def _text(self, token: int) -> str:
        if token < 0:
            return ""
        return bytes(llama_cpp.llama_vocab_get_text(self._vocab, token) or b"").decode(errors="replace")

    def tokens(self, text: str, *, parse_special: bool, start: bool = True) -> Tokens:
        """Ids of ``text``; at the ``start`` of a prompt with what the model wants there (BOS), once."""
        if start and self.adds_bos and self.bos and parse_special and text.startswith(self.bos):
            text = text[len(self.bos) :]
        data = text.encode(errors="replace")
        count = self._tokenize(data, parse_special, start)
        if count < 0:
            self._buffer = (llama_cpp.llama_token * (-count))()
            count = self._tokenize(data, parse_special, start)
        return np.ctypeslib.as_array(self._buffer)[:count].astype(np.int32)

    def _special(self, text: str) -> Tokens:
        return self.tokens(text, parse_special=True, start=False)

    def inner(self, text: str, *, parse_special: bool, after: int) -> Tokens:
        """Ids of a text in the middle of others, ``after`` this token.

        SentencePiece puts a space before a text at the start of a prompt and after a special token, and nowhere else.
        """
        if not self._lead or (after != NO_TOKEN and self._attributes(after) & SPECIAL):
            return self.tokens(text, parse_special=parse_special, start=False)
        lead = self.tokens(self._lead, parse_special=False, start=False)
        return self.tokens(self._lead + text, parse_special=parse_special, start=False)[len(lead) :]

    def within(self, text: str) -> list[int]:
        """Ids of a text that is put into an answer; control tokens that it spells are themselves."""
        found: list[int] = self.inner(text, parse_special=True, after=NO_TOKEN).tolist()
        return found

    def _space_eater(self) -> str:
        """What a space is put before, and which joins with nothing; empty where no space is put before a text."""
        bare = self.tokens("x", parse_special=False, start=False)
        if self._spelt(bare) == b"x":
            return ""
        for lead in ("\x01", "\n"):
            known = self.tokens(lead, parse_special=False, start=False)
            both = self.tokens(f"{lead}x", parse_special=False, start=False)
            if np.array_equal(both[: len(known)], known) and self._spelt(both[len(known) :]) == b"x":
                return lead
        return ""

    def _spelt(self, tokens: Tokens) -> bytes:
        return b"".join(self.piece(int(each)) for each in tokens)

    def _attributes(self, token: int) -> int:
        return int(llama_cpp.llama_vocab_get_attr(self._vocab, token))

    def control_texts(self) -> list[str]:
        """What a prompt whose special tokens are parsed spells control tokens with."""
        return [self._text(each) for each in range(self.size) if self._attributes(each) & PARSED]

    def user_defined_texts(self) -> list[str]:
        """The tokens that are taken out of any text, parsed or not."""
        user_defined = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        return [self._text(each) for each in range(self.size) if self._attributes(each) & user_defined]

    def _tokenize(self, data: bytes, parse_special: bool, start: bool) -> int:
        size = len(self._buffer)
        return int(llama_cpp.llama_tokenize(self._vocab, data, len(data), self._buffer, size, start, parse_special))

    def end_tokens(self) -> list[int]:
        """Every token that ends an answer; the one that the model names first."""
        first = int(llama_cpp.llama_vocab_eos(self._vocab))
        others = [each for each in range(self.size) if llama_cpp.llama_vocab_is_eog(self._vocab, each)]
        return [first, *(each for each in others if each != first)] if first >= 0 else others

    def constraint_tokenizer(self) -> Any:
        """llguidance's view of the vocabulary."""
        from llguidance.llamacpp import lltokenizer_from_vocab

        with warnings.catch_warnings():
            # It asks for the kind of each token by a name that the bindings gave up.
            warnings.simplefilter("ignore", DeprecationWarning)
            return lltokenizer_from_vocab(self._vocab, eos_token=self.end_tokens() or None)

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to the text; none for control tokens but those that mark a reasoning.

        May be part of a character.
        """
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._piece(token, 64)
        return found

    def _piece(self, token: int, room: int) -> bytes:
        buffer = ctypes.create_string_buffer(room)
        size = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, 0, token in self._marks)
        return self._piece(token, -size) if size < 0 else buffer.raw[:size]

    def ends(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        found = self._ends.get(token)
        if found is None:
            found = self._ends[token] = bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))
        return found
