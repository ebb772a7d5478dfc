"""Answers bound by a grammar: which tokens may come next, and which must, by llguidance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptmill.tasks.grammars import grammar_of
from promptmill.types import SamplingParams
from promptmill_workers.engines.contract import GrammarError

#: Compiled grammars that are kept: the requests of a job mostly share one.
KEPT = 256


class Grammars:
    """The compiled grammars of one model."""

    def __init__(self, make_tokenizer: Callable[[], Any], vocabulary: int) -> None:
        """``make_tokenizer`` gives llguidance's view of the vocabulary: it takes most of a second, so not before it is
        needed. ``vocabulary``: entries of a row of logits, which may be more than there are tokens."""
        self._make_tokenizer = make_tokenizer
        self._tokenizer: Any = None
        self.vocabulary = vocabulary
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def constraint(self, sampling: SamplingParams) -> Constraint | None:
        """What binds one answer; None when it is free. Raises GrammarError."""
        grammar = grammar_of(sampling)
        if grammar is None:
            return None
        found = self._compiled.get(grammar)
        if found is None:
            found = self._compile(grammar)
        self._compiled.move_to_end(grammar)
        return Constraint(found.deep_copy(), self.vocabulary)

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        made = LLMatcher(self._tokenizer, grammar, log_level=0)
        if made.is_error():
            raise GrammarError(f"the grammar cannot be used: {' '.join(made.get_error().split())[:200]}")
        self._compiled[grammar] = made
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return made


class Constraint:
    """The state of one answer within its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._mask = np.zeros((vocabulary + 31) // 32, dtype=np.int32)

    @property
    def is_over(self) -> bool:
        """The answer is complete: nothing but the end may follow. Raises GrammarError at a dead end.

        llguidance stops there too, with an error, when what was written so far cannot become what the grammar asks for.
        """
        self._refuse_dead_end()
        if not self._matcher.is_stopped():
            return False
        if not self._matcher.is_accepting():
            raise GrammarError("the grammar ended before the answer was complete")
        return True

    def _refuse_dead_end(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar came to a dead end: {_reason(self._matcher)}")

    def allowed(self) -> NDArray[np.int64]:
        """Ids of the tokens that may come next, ends of the answer among them. Raises GrammarError."""
        # After an error the mask would hold the end of the answer alone.
        self._refuse_dead_end()
        self._mask[:] = 0
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._vocabulary]
        ids = np.flatnonzero(bits)
        self._refuse_dead_end()
        if not len(ids):
            raise GrammarError(f"the grammar allows no token: {_reason(self._matcher)}")
        return ids

    def take(self, token: int) -> None:
        """``token`` is the next of the answer. Raises GrammarError when the grammar does not have it."""
        if not self._matcher.consume_token(token):
            raise GrammarError(f"the grammar was left: {_reason(self._matcher)}")

    def forced(self) -> list[int]:
        """Tokens that must come next, whatever the model says. Raises GrammarError."""
        found = list(self._matcher.compute_ff_tokens())
        self._refuse_dead_end()
        return found


def _reason(matcher: Any) -> str:
    """The sentence of llguidance's error, without the state of its parser, which quotes the answer."""
    text = " ".join(matcher.get_error().split()).partition(" <state>")[0][:160]
    return "nothing may follow what is written" if text.startswith("NoExtensionBias") else text
