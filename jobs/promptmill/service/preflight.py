"""What can be known of a job before any device is used: prompt lengths, rows that cannot fit, tokens to expect."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from promptmill.tasks.sampling import PromptTooLong, refuse_unknown_tokens
from promptmill.types import Request, SamplingParams

#: Rows whose prompts are all tokenised; of later ones every SAMPLE_EVERY-th is. Tokenising a million prompts would
#: take longer than storing them.
MEASURED_ROWS = 20_000
SAMPLE_EVERY = 50

#: Rows that are looked at for a doubled BOS: mostly a chat template writes it, in all of them.
LOOKED_AT_ROWS = 1_000

#: Tokens that a chat template puts around a message, on the safe side.
TEMPLATE_TOKENS = 64

#: A context is rounded up to this many tokens, and is not smaller than the second.
CONTEXT_STEP = 256
SMALLEST_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Preflight:
    """The findings. Token counts are of prompts as the model sees them."""

    rows: int
    measured: int
    tokens_min: int
    tokens_p50: int
    tokens_p99: int
    tokens_max: int
    #: Sum over all rows; an estimate where ``measured`` is less than ``rows``.
    prompt_tokens: int
    #: Sum of what the rows may generate at most.
    max_output_tokens: int
    too_long: int
    #: Rows whose answer the context may cut before it has ``max_tokens``.
    cut: int
    context_tokens: int
    #: Prompts that begin with the token of a beginning (BOS) twice, of the first rows.
    two_starts: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PromptGauge:
    """Sees every request of a submission; refuses those that cannot fit, and remembers lengths in little memory."""

    def __init__(
        self,
        count: Callable[[Request], int],
        context_tokens: int,
        vocabulary: int | None = None,
        has_two_starts: Callable[[Request], bool] = lambda request: False,
    ) -> None:
        """``count`` gives the tokens of a request's prompt; ``context_tokens`` is the most a request may hold.

        ``vocabulary``: tokens of the model, None when it has none of its own. ``has_two_starts``: whether a prompt
        begins with BOS twice.
        """
        self._count = count
        self._has_two_starts = has_two_starts
        self._two_starts = 0
        self._vocabulary = vocabulary
        self._context = context_tokens
        self._lengths = array("I")
        self._weights = array("I")
        self._rows = self._too_long = self._cut = self._output = 0
        self._need = 0

    def __call__(self, request: Request) -> None:
        """Raises :class:`PromptTooLong` for a prompt that leaves no room for one token, BadParameter for a bias on a
        token that the model does not have."""
        self._rows += 1
        if self._vocabulary is not None:
            refuse_unknown_tokens(request.sampling, self._vocabulary)
        bound = _bytes(request) + TEMPLATE_TOKENS
        if self._rows <= MEASURED_ROWS or bound >= self._context:
            self._measure(request, 1)
        elif self._rows % SAMPLE_EVERY == 0:
            self._measure(request, SAMPLE_EVERY)
        else:
            # A token is at least a byte: the row fits, whatever its tokens are.
            self._need = max(self._need, bound + _answer_tokens(request))
        self._output += request.sampling.max_tokens * request.sampling.n

    def _measure(self, request: Request, stands_for: int) -> None:
        """``stands_for``: rows that this one is the sample of; long rows are all measured, so that one is itself."""
        tokens = self._count(request)
        if tokens >= self._context:
            self._too_long += 1
            raise PromptTooLong(f"the prompt has {tokens:,} tokens, the model's context {self._context:,}")
        if len(self._lengths) < LOOKED_AT_ROWS:
            self._two_starts += self._has_two_starts(request)
        self._lengths.append(tokens)
        self._weights.append(stands_for)
        self._cut += stands_for if tokens + _answer_tokens(request) > self._context else 0
        self._need = max(self._need, tokens + _answer_tokens(request))

    @property
    def context_needed(self) -> int:
        """Tokens that a context needs for the longest of the requests, at most the model's."""
        rounded = -(-self._need // CONTEXT_STEP) * CONTEXT_STEP
        return min(max(rounded, SMALLEST_CONTEXT), self._context)

    def tokens_of(self, text: str) -> int:
        """Tokens of a text as it is, without a chat template."""
        return self._count(Request(0, "", SamplingParams(), prompt=text)) if text else 0

    def findings(self) -> Preflight:
        """Percentiles are of the measured lengths, sampled rows counting for those they stand for."""
        import numpy as np

        lengths = np.array(self._lengths, dtype=np.int64)
        weights = np.array(self._weights, dtype=np.int64)
        if not len(lengths):
            lengths, weights = np.zeros(1, np.int64), np.ones(1, np.int64)
        p50, p99 = np.percentile(lengths, [50, 99], weights=weights, method="inverted_cdf")
        total = float((lengths * weights).sum()) * (self._rows - self._too_long) / max(1, int(weights.sum()))
        return Preflight(
            rows=self._rows, measured=len(self._lengths), tokens_min=int(lengths.min()), tokens_p50=int(p50),
            tokens_p99=int(p99), tokens_max=int(lengths.max()), prompt_tokens=round(total),
            max_output_tokens=self._output, too_long=self._too_long, cut=self._cut,
            context_tokens=self._context, two_starts=self._two_starts,
        )  # fmt: skip


def _answer_tokens(request: Request) -> int:
    """Most tokens after the prompt. A token is at least a byte of a text that is scored; one may end it."""
    scored = (*request.sampling.continuations, *request.sampling.choices)
    if not scored:
        return request.sampling.max_tokens
    return max(len(text.encode(errors="replace")) for text in scored) + 1


def _bytes(request: Request) -> int:
    """Length of all texts of a request in bytes of UTF-8, without encoding what is plain ASCII."""
    texts = [request.prompt] if request.prompt is not None else [each.content for each in request.messages or ()]
    return sum(len(text) if text.isascii() else len(text.encode(errors="replace")) for text in texts)
