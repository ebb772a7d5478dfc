"""Text to token ids and back, by the tokenizer of an MLX folder. Imports no MLX: counting prompts needs no device."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from promptmill.errors import ModelError, RequestError
from promptmill.types import SamplingParams
from promptmill_workers.engines.answer import END_OF_THINK, THINK
from promptmill_workers.engines.chat_template import ANSWERED, PLAIN, after_answer, thinking_names
from promptmill_workers.engines.contract import template_digest
from promptmill_workers.engines.prefix_plan import Tokens
from promptmill_workers.engines.prompt_pieces import Controls, Piece
from promptmill_workers.engines.prompts import PromptReader

#: Context of a model whose configuration does not say what it was trained for.
CONTEXT_UNKNOWN = 4096

#: What decoders write for bytes that are no character (yet).
NO_CHARACTER = "\ufffd"


class MlxTokenizer(PromptReader):
    """The words of an MLX folder: its tokenizer, its chat template and the tokens that end an answer."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError for a folder without a usable configuration or tokenizer."""
        config = read_json(folder, "config.json")
        self._tokenizer = _load(folder)
        self.context_tokens = _context(config)
        #: The rows of logits may be longer.
        self.vocabulary = len(self._tokenizer)
        self.bos = self._tokenizer.bos_token or ""
        starts = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        self.start = [each for each in starts if each is not None][:1]
        self.eos_ids = _eos_ids(config, folder, self._tokenizer.eos_token_id)

    @cached_property
    def _controls(self) -> Controls:  # type: ignore[override]
        added = self._tokenizer.added_tokens_decoder.values()
        return Controls(
            (each.content for each in added if each.special), (each.content for each in added if not each.special)
        )

    def _chat_template(self, sampling: SamplingParams) -> FolderTemplate:
        if not self._tokenizer.chat_template:
            raise RequestError("the model has no chat template: send raw prompts (/v1/completions lines)")
        return FolderTemplate(self._tokenizer, sampling)

    @property
    def template_digest(self) -> str:
        known = self._tokenizer.chat_template
        return template_digest(*(known.values() if isinstance(known, dict) else (known,)))

    @cached_property
    def end(self) -> int | None:  # type: ignore[override]
        """What the chat template writes after an answer, else what the tokenizer names."""
        named: int | None = self._tokenizer.eos_token_id
        try:
            after = self._ids(after_answer(self._chat_template(PLAIN).write(ANSWERED, None, PLAIN, ask=False)))
        except RequestError:
            return named
        return next((each for each in after if each in self.eos_ids), named)

    def _framed(self, tokens: Tokens) -> Tokens:
        """With what belongs at its start, but for a BOS that it has itself, and at its end. A template writes special
        tokens, BOS included, as text."""
        found, frame = tokens.tolist(), self._tokenizer.encode("", add_special_tokens=True)
        bos = self._tokenizer.bos_token_id
        start = frame[:1] if bos is not None and frame[:1] == [bos] else []
        return np.array([*([] if found[:1] == start else start), *found, *frame[len(start) :]], dtype=np.int32)

    def _piece_tokens(self, piece: Piece, after: int | None) -> Tokens:
        ids = self._ids(piece.text, plain=piece.plain) if after is None else self._inner(piece.text, after, piece.plain)
        return np.array(ids, dtype=np.int32)

    def within(self, text: str) -> list[int]:
        """Tokens of a text that is put into an answer; control tokens that it spells are themselves."""
        return self._inner(text, None, False)

    def _inner(self, text: str, after: int | None, plain: bool) -> list[int]:
        """Tokens of a text in the middle of others, ``after`` this token or one that is not special.

        SentencePiece puts a space before a text at the start of a prompt and after a special token, and nowhere else.
        """
        if not self._lead or after in self._tokenizer.added_tokens_decoder:
            return self._ids(text, plain=plain)
        return self._ids(self._lead + text, plain=plain)[len(self._ids(self._lead)) :]

    @cached_property
    def _lead(self) -> str:
        """What a space is put before, and which joins with nothing; empty where no space is put before a text."""
        bare = self._ids("x")
        for lead in ("\x01", "\n"):
            known, both = self._ids(lead), self._ids(f"{lead}x")
            if both[: len(known)] == known:
                return lead if both[len(known) :] != bare else ""
        return ""

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        # A lone half of a surrogate pair has no UTF-8, which is all the tokenizer takes.
        clean = text.encode("utf-8", errors="replace").decode()
        return list(self._tokenizer.encode(clean, add_special_tokens=False, split_special_tokens=plain, verbose=False))

    def piece(self, token: int) -> bytes:
        """What a token adds to a text; none for control tokens but those that mark a reasoning."""
        return self.text([token]).encode()

    def constraint_tokenizer(self, vocabulary: int) -> Any:
        """llguidance's view of the words, for rows of ``vocabulary`` logits. Raises RequestError."""
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, n_vocab=vocabulary, eos_token=sorted(self.eos_ids) or None)
        except (ValueError, AttributeError) as problem:
            raise RequestError(f"answers of this model cannot be bound: {str(problem)[:120]}") from None

    def text(self, ids: Sequence[int]) -> str:
        """Control tokens add nothing, but for those that mark a reasoning; bytes that are no character are replaced."""
        for at, token in enumerate(ids) if self._marks else ():
            if token in self._marks:
                return self.text(ids[:at]) + self._marks[token] + self.text(ids[at + 1 :])
        # "Cleaning up" would change the spaces of an answer, for one in JSON.
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def _marks(self) -> dict[int, str]:
        """Reasoning marks that are control tokens."""
        known = self._tokenizer.added_tokens_decoder.items()
        return {token: each.content for token, each in known if each.special and each.content in (THINK, END_OF_THINK)}


class FolderTemplate:
    """The chat template of a folder, as transformers renders it: in jinja2's immutable sandbox."""

    def __init__(self, tokenizer: Any, sampling: SamplingParams) -> None:
        """With several templates the one for tools where there are some, as transformers chooses."""
        self._tokenizer = tokenizer
        known = tokenizer.chat_template
        if isinstance(known, dict):
            known = known.get("tool_use" if sampling.tools else "default", known.get("default", ""))
        self.source = str(known)

    def write(
        self, turns: Sequence[dict[str, Any]], tools: list[Any] | None, sampling: SamplingParams, ask: bool
    ) -> str:
        """Raises RequestError for messages that the template refuses."""
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=ask, **thinking_names(sampling.thinking)
            )
        except Exception as problem:
            # Whatever a model's template does wrong concerns this request only.
            raise RequestError(f"the model's chat template refuses the messages: {str(problem)[:120]}") from None
        return str(text)


class MlxAnswerText:
    """The text of one answer, token by token where stop texts must be looked for, else in one go at its end."""

    def __init__(self, tokenizer: MlxTokenizer, stops: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self._ids: list[int] = []
        self._text = ""
        # Tokens before _read are in _text. Those from _context on are decoded again with each new token: what a token
        # adds depends on its neighbours (spaces, characters of several tokens).
        self._context = 0
        self._read = 0
        self._shown = 0
        self._cut = False

    def add(self, token: int) -> bool:
        """Take the next token; True when a stop text is complete. The text then ends before it."""
        self._ids.append(token)
        return bool(self._stops) and self._read_on()

    def _read_on(self) -> bool:
        fresh = self._fresh()
        if fresh.endswith(NO_CHARACTER):
            return False
        self._context, self._read = self._read, len(self._ids)
        return self._append(fresh)

    def finish(self) -> tuple[str, bool]:
        """The text, and whether it was cut at a stop text that only the end made readable."""
        if self._cut:
            return self._text, False
        rest = self._fresh() if self._read else self._tokenizer.text(self._ids)
        # What is no character at the end is one that was not finished.
        cut = self._append(rest.removesuffix(NO_CHARACTER))
        return self._text, cut

    def fresh(self) -> str:
        """What has come since this was last asked, without what may be the start of a stop text."""
        if not self._stops:
            self._read_on()
        held = max(
            (size for stop in self._stops for size in range(1, len(stop)) if self._text.endswith(stop[:size])),
            default=0,
        )
        end = len(self._text) - (0 if self._cut else held)
        text = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return text

    def _fresh(self) -> str:
        """What the tokens since ``_read`` add."""
        known = self._tokenizer.text(self._ids[self._context : self._read])
        return self._tokenizer.text(self._ids[self._context :])[len(known) :]

    def _append(self, fresh: str) -> bool:
        start = max(0, len(self._text) - self._longest + 1)
        self._text += fresh
        found = [at for stop in self._stops if (at := self._text.find(stop, start)) >= 0]
        if found:
            self._text, self._cut = self._text[: min(found)], True
        return bool(found)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a model's folder. Raises ModelError."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8-sig"))
    except OSError:
        raise ModelError(f"{folder.name} has no readable {name}", hint="Give the folder of an MLX model.") from None
    except ValueError:
        raise ModelError(
            f"{name} of {folder.name} is not JSON", hint="The file may be damaged: fetch it again."
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{name} of {folder.name} is no JSON object")
    return value


def _load(folder: Path) -> Any:
    # Said before the import, which otherwise warns that PyTorch is missing: only the tokenizer is wanted.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        # Left open, a tokenizer with code of its own would ask on the terminal whether to run it.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as problem:
        # The libraries below raise whatever they like, down to bare Exception.
        reason = str(problem).strip().split("\n")[0][:200]
        raise ModelError(f"the tokenizer of {folder.name} cannot be loaded: {reason}") from None


def _context(config: dict[str, Any]) -> int:
    nested = config.get("text_config") or {}
    found = config.get("max_position_embeddings") or nested.get("max_position_embeddings")
    return int(found) if found else CONTEXT_UNKNOWN


def _eos_ids(config: dict[str, Any], folder: Path, of_tokenizer: int | None) -> frozenset[int]:
    """The generation settings go before the configuration, as in mlx-lm; the tokenizer's own end always counts."""
    generation = read_json(folder, "generation_config.json") if (folder / "generation_config.json").exists() else {}
    named = generation.get("eos_token_id") or config.get("eos_token_id") or []
    ids = {named} if isinstance(named, int) else set(named)
    return frozenset(ids if of_tokenizer is None else {*ids, of_tokenizer})
