"""Which cells of the KV cache a request starts from, and whether there are enough for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from promptmill_workers.engines.llama.batch import Tokens
from promptmill_workers.engines.llama.binding import Context
from promptmill_workers.engines.llama.prefixes import LlamaPrefix, LlamaPrefixes
from promptmill_workers.engines.llama.slots import LlamaRunning, LlamaWaiting
from promptmill_workers.engines.prefix_plan import LEAST_TOKENS, common_length, plan_nested


class KVCache:
    """The KV cache between running sequences and shared prefixes, and the plan over those that wait for it."""

    def __init__(self, context: Context, prefix_sequences: Iterable[int], *, shares: bool) -> None:
        """``shares``: whether a part of a sequence can be copied."""
        self._context = context
        self._shares = shares
        self.prefixes = LlamaPrefixes(context, prefix_sequences)
        self.waiting: deque[LlamaWaiting] = deque()
        self.running: dict[int, LlamaRunning] = {}
        self.planned = True

    @property
    def used_cells(self) -> int:
        return self.prefixes.cells + sum(each.cells for each in self.running.values())

    def plan(self) -> None:
        """Decide which prefixes to share, and bring requests that share one together."""
        self.planned = True
        if not self._shares:
            self.waiting = deque(sorted(self.waiting, key=lambda each: not each.request.urgent))
            return
        waiting = list(self.waiting)
        # A planned prefix never holds the last token of what is planned: that of a question is left out here.
        nested = plan_nested([each.question for each in waiting], owners=[each.owner for each in waiting])
        for each, shared in zip(waiting, nested.shared, strict=True):
            each.shared = shared
        # Urgent ones first; sorting keeps the order of the others.
        self.waiting = deque(
            sorted((waiting[index] for index in nested.order), key=lambda each: not each.request.urgent)
        )

    def prefix_for(self, waiting: LlamaWaiting) -> tuple[LlamaPrefix | None, int, bool]:
        """The prefix to use, how many of its tokens, and whether these are in the KV cache.

        The best that is here, or a new one when the plan wants clearly more.
        """
        prefix, shared = self.prefixes.longest(waiting.owner, waiting.head)
        if waiting.shared - shared >= LEAST_TOKENS:
            if prefix is not None and prefix.done < shared:
                return prefix, shared, False  # A new one will continue this one.
            made = self._new_prefix(waiting.owner, waiting.prompt[: waiting.shared])
            if made is not None:
                prefix, shared = made, waiting.shared
        return prefix, shared, prefix is None or prefix.done >= shared

    def _new_prefix(self, owner: str, tokens: Tokens) -> LlamaPrefix | None:
        """Start a prefix with what its owner's others have computed of it; None without a sequence or room for it."""
        if self.prefixes.full and not self.prefixes.forget_one(self.prompts()):
            return None
        if not self.make(len(tokens)):
            return None
        base, shared = self.prefixes.longest(owner, tokens)
        done = min(base.done, shared) if base else 0
        neighbour, common = self.neighbour(owner, tokens)
        if neighbour is not None and common > done:
            return self.prefixes.begin(owner, tokens, neighbour.slot, common)
        return self.prefixes.begin(owner, tokens, base.sequence if base else 0, done)

    def neighbour(self, owner: str, tokens: Tokens) -> tuple[LlamaRunning | None, int]:
        """The owner's running sequence that has computed most of ``tokens``, and how many."""
        best, shared = None, LEAST_TOKENS - 1
        for running in self.running.values() if self._shares else ():
            if running.waiting.owner != owner:
                continue
            length = min(running.done, common_length(running.waiting.prompt, tokens))
            if length > shared and self._context.can_share(running.slot, length):
                best, shared = running, length
        return best, shared if best else 0

    def make(self, cells: int, keep: LlamaPrefix | None = None) -> bool:
        """Whether ``cells`` are free, after forgetting prefixes that nobody uses if need be."""
        while self.used_cells + cells > self._context.cells:
            if not self.prefixes.forget_one(self.prompts(), keep):
                return False
        return True

    def prompts(self) -> Collection[tuple[str, Tokens]]:
        """Those that wait, with their owners: a prefix is worth what it saves them."""
        return [(each.owner, each.prompt) for each in self.waiting]
