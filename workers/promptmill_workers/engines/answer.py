"""One answer while it is written: how its next token is drawn, what binds it, when it ends, and what its text is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from promptmill.types import Extras, FinishReason, SamplingParams
from promptmill_workers.engines.constraint import Constraint, Grammars
from promptmill_workers.engines.host_sampling import HostSampler, Logits, likeliest, log_sum

#: How models mark what they think before they answer.
THINK, END_OF_THINK = "<think>", "</think>"


def opened(
    rendered: str, sampling: SamplingParams, *, scored: bool = False, ends_in_data: bool = False
) -> tuple[str, bool]:
    """A rendered prompt, and whether the model begins with its reasoning after it.

    ``ends_in_data``: the last that it spells is a text of a message or of a dataset, which opens nothing.

    Where reasoning was asked for and the chat template does not open it, it is opened here; with a budget of 0 it is
    closed here too. A template's own is closed where reasoning is off, and where an answer is ``scored``: it is none of
    the reasoning.
    """
    is_open = rendered.rstrip().endswith(THINK) and not ends_in_data
    if sampling.thinking_budget == 0:
        return _thought_nothing(rendered, is_open), False
    if is_open:
        is_closed = scored or sampling.thinking == "off"
        return (_thought_nothing(rendered, is_open), False) if is_closed else (rendered, True)
    if sampling.thinking in (None, "off"):
        return rendered, False
    return f"{rendered}{THINK}\n", True


def _thought_nothing(rendered: str, is_open: bool) -> str:
    """The prompt with a reasoning that holds nothing, as templates write it where reasoning is off."""
    if rendered.rstrip().endswith(END_OF_THINK):
        return rendered
    return f"{rendered.rstrip() if is_open else rendered + THINK}\n\n{END_OF_THINK}\n\n"


class Text(Protocol):
    """The text of a row of tokens, which ends before the first of its stop texts."""

    def add(self, token: int) -> bool:
        """Take the next token; True when a stop text is complete."""
        ...

    def finish(self) -> tuple[str, bool]:
        """The text, and whether a stop text cut it that only the end made readable."""
        ...

    def fresh(self) -> str:
        """What has come since this was last asked and cannot become part of a stop text any more."""
        ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What of a model its answers are written with."""

    #: Whether the model ends its answer with this token.
    ends: Callable[[int], bool]
    #: The bytes of a token.
    piece: Callable[[int], bytes]
    #: Tokens of a text in the middle of an answer.
    tokens: Callable[[str], list[int]]
    #: A text with these stop texts.
    text: Callable[[tuple[str, ...]], Text]
    grammars: Grammars


def needs_logits(sampling: SamplingParams) -> bool:
    """Whether the next token cannot be drawn where the logits are computed.

    Log-probabilities are no reason: who looks at a draw must not change it.
    """
    return bool(
        sampling.is_constrained
        or sampling.logit_bias
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1
        or sampling.typical_p < 1
    )


class Generation:
    """Takes the tokens of one answer in order. The engine computes; this decides."""

    __slots__ = (
        "_budget", "_closed", "_closing", "_constraint", "_held", "_limit", "_logprobs", "_logprobs_told", "_sampler",
        "_sampling", "_text", "_thinking", "_thought", "_tools", "count", "reasoning_tokens",
    )  # fmt: skip

    def __init__(
        self, tools: Tools, sampling: SamplingParams, prompt: NDArray[np.int32], limit: int, *, thinks: bool = False
    ) -> None:
        """``limit``: most tokens; ``thinks``: the prompt ends where the model begins to reason. Raises GrammarError."""
        self._tools = tools
        self._sampling = sampling
        self._limit = limit
        self._text = tools.text(sampling.stop)
        self._thinking = thinks
        self._thought = tools.text((END_OF_THINK,)) if thinks else None
        #: The start of the text, until the client that waits for it was told some; None from then on.
        self._held: str | None = ""
        self._budget = sampling.thinking_budget
        #: The model has ended within its reasoning; the end of the reasoning is put into the answer.
        self._closing = self._closed = False
        self._constraint: Constraint | None = tools.grammars.constraint(sampling) if sampling.is_constrained else None
        self._sampler = HostSampler(sampling, prompt) if needs_logits(sampling) else None
        self._logprobs: list[dict[str, Any]] | None = [] if sampling.logprobs else None
        self._logprobs_told = 0
        self.count = 0
        self.reasoning_tokens = 0

    @property
    def draws(self) -> bool:
        """Whether the next token is drawn here."""
        return self._sampler is not None

    @property
    def observes(self) -> bool:
        """Whether the logits of each token are looked at."""
        return self._logprobs is not None

    def draw(self, logits: Logits) -> int:
        """The next token, for a request that :func:`needs_logits`. Raises GrammarError."""
        assert self._sampler is not None
        bound = self._constraint is not None and not self._thinking
        token = self._sampler.draw(logits, self._constraint.allowed() if bound and self._constraint else None)
        self.observe(logits, token)
        return token

    def observe(self, logits: Logits, token: int) -> None:
        """``token`` was drawn from these logits: note its log-probability where it was asked for."""
        if self._logprobs is not None and not self._thinking and not self._tools.ends(token):
            self._logprobs.append(self._logprob(logits, token))

    def take(self, token: int) -> FinishReason | None:
        """``token`` is the next one; why the answer has ended with it, if it has. Raises GrammarError."""
        self.count += 1
        if self._sampler is not None:
            self._sampler.saw(token)
        if self._tools.ends(token):
            # A bound answer is still to come when the model ends within its reasoning.
            self._closing = self._thinking and self._constraint is not None
            if not self._sampling.ignore_eos and not self._closing:
                return FinishReason.STOP
        elif self._thinking:
            self._think(token)
        elif self._write(token):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.count >= self._limit else None

    def _think(self, token: int) -> None:
        """One more token of the reasoning. The mark of its end is none of it, whatever wrote it."""
        assert self._thought is not None
        if not self._closed:
            self.reasoning_tokens += 1
        self._thinking = not self._thought.add(token)
        if not self._thinking and not self._closed:
            self.reasoning_tokens = max(0, self.reasoning_tokens - len(self._tools.tokens(END_OF_THINK)))

    def _write(self, token: int) -> bool:
        """Whether the answer is complete with the token: at a stop text, or where its grammar ends."""
        if self._constraint is not None:
            self._constraint.take(token)
        stopped = self._text.add(token)
        return stopped or (self._constraint is not None and self._constraint.is_over)

    def forced(self) -> list[int]:
        """Tokens that follow whatever the model says: the end of a reasoning that is over its budget, what the grammar
        leaves no choice about."""
        if self._thinking:
            self._closed = self._closing or (self._budget is not None and self.reasoning_tokens >= self._budget)
            return self._tools.tokens(f"\n{END_OF_THINK}") if self._closed else []
        # A log-probability needs the logits of each token.
        if self._constraint is None or self._logprobs is not None:
            return []
        return self._constraint.forced()

    def fresh(self) -> str:
        """Text for the client that waits for it; no reasoning, whatever opened it."""
        if self._thinking:
            return ""
        if self._held is None:
            return self._text.fresh()
        self._held += self._text.fresh()
        begun = self._begun(self._held)
        if begun:
            self._held = None
        return begun

    def _begun(self, text: str) -> str:
        """What of the answer has begun, as :meth:`finish` will give it; nothing while it may still be a reasoning."""
        lead = text.lstrip()
        if self._thought is not None:
            return lead
        if lead.startswith(THINK):
            return lead.partition(END_OF_THINK)[2].lstrip()
        return "" if THINK.startswith(lead) else text

    def fresh_logprobs(self) -> list[dict[str, Any]] | None:
        """Those of the tokens since this was last asked; None where they were not asked for."""
        if self._logprobs is None:
            return None
        told, self._logprobs_told = self._logprobs_told, len(self._logprobs)
        return self._logprobs[told:]

    def finish(self, reason: FinishReason) -> tuple[str, FinishReason, Extras | None]:
        """The text, why it ended, and what else was asked for."""
        text, cut = self._text.finish()
        thought = self._thought.finish()[0].strip() if self._thought is not None else None
        if self._thought is not None:
            text = text.lstrip()
        elif text.lstrip().startswith(THINK):
            thought, text = self._split(text)
        extras = Extras(thought, logprobs=self._logprobs) if thought is not None or self._logprobs is not None else None
        return text, FinishReason.STOP if cut else reason, extras

    def _split(self, text: str) -> tuple[str, str]:
        """Reasoning and answer of a model that opened its reasoning itself."""
        thought, _, rest = text.partition(THINK)[2].partition(END_OF_THINK)
        self.reasoning_tokens = min(self.count, len(self._tools.tokens(thought)))
        return thought.strip(), rest.lstrip()

    def _logprob(self, logits: Logits, token: int) -> dict[str, Any]:
        total = log_sum(logits)
        entry = self._entry(token, float(logits[token]) - total)
        top = likeliest(logits, self._sampling.top_logprobs)
        return entry | {"top_logprobs": [self._entry(each, float(logits[each]) - total) for each in top]}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._tools.piece(token)
        return {"token": piece.decode(errors="replace"), "logprob": round(logprob, 6), "bytes": list(piece)}
