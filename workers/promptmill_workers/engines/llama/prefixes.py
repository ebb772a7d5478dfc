"""Shared prompt prefixes in the KV cache: each lies in a sequence of its own, and requests share its cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from promptmill_workers.engines.llama.binding import Context
from promptmill_workers.engines.prefix_plan import LEAST_TOKENS, Tokens, common_length

#: Waiting prompts that are looked at to value a prefix before one is forgotten.
VALUED_BY = 256


@dataclass(slots=True, eq=False)
class LlamaPrefix:
    """A prefix of an owner's prompts; the first ``done`` of its tokens are in the KV cache.

    Its first user pays for the tokens that it computed, so that those of all requests add up to those of the engine.
    """

    sequence: int
    owner: str
    tokens: Tokens
    done: int
    unpaid: int
    users: int = 0
    used_at: float = 0.0

    @property
    def ready(self) -> bool:
        return self.done == len(self.tokens)


class LlamaPrefixes:
    """The prefixes that are kept. Each is counted with all its cells, though one that continues another shares some:
    so the count never falls below what is in use, whichever of them is forgotten first."""

    def __init__(self, context: Context, sequences: Iterable[int]) -> None:
        self._context = context
        self._spare = list(sequences)
        self._kept: list[LlamaPrefix] = []

    @property
    def cells(self) -> int:
        return sum(len(each.tokens) for each in self._kept)

    @property
    def unfinished(self) -> list[LlamaPrefix]:
        return [each for each in self._kept if not each.ready]

    @property
    def full(self) -> bool:
        """Whether one has to be forgotten before another can begin."""
        return not self._spare

    def longest(self, owner: str, head: Tokens) -> tuple[LlamaPrefix | None, int]:
        """The owner's prefix that has most tokens in common with ``head``, computed or not yet, and how many.

        One whose cells for so many are gone is none.
        """
        best, shared = None, LEAST_TOKENS - 1
        for prefix in self._kept:
            if prefix.owner != owner:
                continue
            length = common_length(prefix.tokens, head)
            if length > shared and self._context.can_share(prefix.sequence, length):
                best, shared = prefix, length
        return best, shared if best else 0

    def begin(self, owner: str, tokens: Tokens, source: int, done: int) -> LlamaPrefix:
        """A new prefix that starts with the first ``done`` cells of the sequence ``source``."""
        prefix = LlamaPrefix(self._spare.pop(), owner, tokens.copy(), done, unpaid=len(tokens) - done)
        if done:
            self._context.share(source, prefix.sequence, done)
        self._kept.append(prefix)
        return prefix

    def use(self, prefix: LlamaPrefix, slot: int, shared: int, now: float) -> int:
        """Let the request in ``slot`` begin with the prefix; returns the tokens that were not computed for it."""
        self._context.share(prefix.sequence, slot, shared)
        prefix.users += 1
        prefix.used_at = now
        paid = min(prefix.unpaid, shared)
        prefix.unpaid -= paid
        return shared - paid

    def forget_one(self, waiting: Iterable[tuple[str, Tokens]], keep: LlamaPrefix | None = None) -> bool:
        """Forget the prefix that saves the waiting prompts the least; False when none can be forgotten.

        ``waiting``: prompts with their owners.
        A prefix in use shares its cells with running sequences: forgetting it would free nothing.
        """
        idle = [each for each in self._kept if each.users == 0 and each.ready and each is not keep]
        if not idle:
            return False
        prompts = list(islice(waiting, VALUED_BY))
        self._forget(min(idle, key=lambda each: (_saves(each, prompts), each.used_at)) if len(idle) > 1 else idle[0])
        return True

    def forget_all(self) -> None:
        """Forget every prefix that no running sequence uses, finished or not."""
        for prefix in [each for each in self._kept if each.users == 0]:
            self._forget(prefix)

    def _forget(self, prefix: LlamaPrefix) -> None:
        self._context.drop(prefix.sequence)
        self._kept.remove(prefix)
        self._spare.append(prefix.sequence)


def _saves(prefix: LlamaPrefix, prompts: Iterable[tuple[str, Tokens]]) -> int:
    """Tokens that prompts of its owner have in common with the prefix."""
    lengths = (common_length(prefix.tokens, prompt) for owner, prompt in prompts if owner == prefix.owner)
    return sum(length for length in lengths if length >= LEAST_TOKENS)
