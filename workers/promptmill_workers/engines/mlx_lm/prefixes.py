"""Prompt prefixes whose KV cache is at hand. A sequence begins with a copy: time is saved, memory is not."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from promptmill_workers.engines.prefix_plan import LEAST_TOKENS, Tokens, common_length

if TYPE_CHECKING:
    from promptmill_workers.engines.mlx_lm.binding import Batcher, Cache

#: Prefixes that are kept at once; each takes its cells.
PREFIXES = 8


@dataclass(frozen=True, slots=True, eq=False)
class MlxPrefix:
    """Tokens of an owner's prompts and the cache after them."""

    owner: str
    tokens: Tokens
    cache: Cache


@dataclass(slots=True)
class PrefixWork:
    """What computing prefixes took."""

    seconds: float = 0.0
    tokens: int = 0


class MlxPrefixes:
    """The prefixes kept, the least recently used first."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._kept: list[MlxPrefix] = []
        self._work = PrefixWork()

    @property
    def cells(self) -> int:
        """KV cells that the prefixes take."""
        return sum(len(each.tokens) for each in self._kept)

    def take_work(self) -> PrefixWork:
        """The work since this was last asked."""
        taken, self._work = self._work, PrefixWork()
        return taken

    def begin(self, owner: str, prompt: Tokens, shared: int) -> tuple[MlxPrefix | None, int]:
        """The owner's prefix to start ``prompt`` from, and how many of its tokens were there before.

        ``shared`` tokens are planned to be computed once: the prompt that comes first computes them.
        """
        best = self._best(owner, prompt[:-1])
        known = len(best.tokens) if best else 0
        if shared - known < LEAST_TOKENS:
            return best, known
        return self._compute(owner, prompt[:shared], best), known

    def wanted(self, owner: str, prompt: Tokens, shared: int) -> MlxPrefix | None:
        """The owner's prefix that ``prompt`` would start from instead of computing another."""
        for prefix in self._of(owner):
            known = common_length(prefix.tokens, prompt[:-1])
            if known >= LEAST_TOKENS and shared - known < LEAST_TOKENS:
                return prefix
        return None

    def forget(self, surplus: int, keep: MlxPrefix | None) -> None:
        """Free ``surplus`` cells by forgetting prefixes other than ``keep``, or all there are."""
        for prefix in [each for each in self._kept if each is not keep]:
            if surplus <= 0:
                return
            # Sequences that began with it have copies: forgetting it disturbs no sequence.
            self._kept.remove(prefix)
            surplus -= len(prefix.tokens)

    def clear(self) -> None:
        self._kept.clear()

    def _of(self, owner: str) -> list[MlxPrefix]:
        return [each for each in self._kept if each.owner == owner]

    def _best(self, owner: str, head: Tokens) -> MlxPrefix | None:
        """What is at hand of the start of ``head``: a whole prefix, or as much of one as is the same."""
        found = [(common_length(each.tokens, head), each) for each in self._of(owner)]
        for length, prefix in sorted(found, key=lambda pair: pair[0], reverse=True):
            if length < LEAST_TOKENS:
                return None
            cache = self._batcher.shortened(prefix.cache, len(prefix.tokens) - length)
            if cache is not None:
                self._kept.remove(prefix)
                self._kept.append(prefix)
                return replace(prefix, tokens=prefix.tokens[:length], cache=cache)
        return None

    def _compute(self, owner: str, tokens: Tokens, base: MlxPrefix | None) -> MlxPrefix:
        started = time.monotonic()
        known = len(base.tokens) if base else 0
        made = MlxPrefix(owner, tokens.copy(), self._batcher.prefill(tokens[known:], base.cache if base else None))
        self._work.seconds += time.monotonic() - started
        self._work.tokens += len(tokens) - known
        self._kept = [*self._kept[-PREFIXES + 1 :], made]
        return made
