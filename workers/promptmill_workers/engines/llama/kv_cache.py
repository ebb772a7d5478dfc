"""Which cells of the KV cache a request starts from, and whether there are enough for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from promptmill_workers.engines.llama.binding import Context
from promptmill_workers.engines.llama.prefixes import LlamaPrefix, LlamaPrefixes
from promptmill_workers.engines.llama.sequence import LlamaSequence
from promptmill_workers.engines.prefix_plan import LEAST_TOKENS, Tokens, common_length, plan_nested

Waiting = Collection[LlamaSequence]


class KVCache:
    """The KV cache between running sequences and shared prefixes, and the plan over those that wait for it."""

    def __init__(self, context: Context, prefix_sequences: Iterable[int], *, shares: bool) -> None:
        """``shares``: whether a part of a sequence can be copied."""
        self._context = context
        self._shares = shares
        self.prefixes = LlamaPrefixes(context, prefix_sequences)
        #: Those that have cells, by slot.
        self.running: dict[int, LlamaSequence] = {}

    @property
    def used_cells(self) -> int:
        return self.prefixes.cells + sum(each.cells for each in self.running.values())

    def plan(self, waiting: Sequence[LlamaSequence]) -> Iterable[LlamaSequence]:
        """Decide which prefixes to share, and bring requests that share one together."""
        if not self._shares:
            return waiting
        found = list(waiting)
        # A planned prefix never holds the last token of what is planned: that of a question is left out here.
        nested = plan_nested([each.question for each in found], owners=[each.owner for each in found])
        for each, shared in zip(found, nested.shared, strict=True):
            each.shared = shared
        return [found[index] for index in nested.order]

    def prefix_for(self, sequence: LlamaSequence, waiting: Waiting) -> tuple[LlamaPrefix | None, int, bool]:
        """The prefix to use, how many of its tokens, and whether these are in the KV cache.

        The best that is here, or a new one when the plan wants clearly more.
        """
        prefix, shared = self.prefixes.longest(sequence.owner, sequence.head)
        if sequence.shared - shared >= LEAST_TOKENS:
            if prefix is not None and prefix.done < shared:
                return prefix, shared, False  # A new one will continue this one.
            made = self._new_prefix(sequence.owner, sequence.prompt[: sequence.shared], waiting)
            if made is not None:
                prefix, shared = made, sequence.shared
        return prefix, shared, prefix is None or prefix.done >= shared

    def _new_prefix(self, owner: str, tokens: Tokens, waiting: Waiting) -> LlamaPrefix | None:
        """Start a prefix with what its owner's others have computed of it; None without a sequence or room for it."""
        if self.prefixes.full and not self.prefixes.forget_one(_prompts(waiting)):
            return None
        if not self.make(len(tokens), waiting):
            return None
        base, shared = self.prefixes.longest(owner, tokens)
        done = min(base.done, shared) if base else 0
        neighbour, common = self._neighbour(owner, tokens)
        if neighbour is not None and common > done:
            return self.prefixes.begin(owner, tokens, neighbour.slot, common)
        return self.prefixes.begin(owner, tokens, base.sequence if base else 0, done)

    def begin(self, sequence: LlamaSequence, prefix: LlamaPrefix | None, shared: int) -> None:
        """Let a sequence that was given a slot start from ``shared`` tokens of a prefix, or from a neighbour's."""
        if prefix is not None:
            cached = self.prefixes.use(prefix, sequence.slot, shared, sequence.admitted_at)
            sequence.prefix, sequence.prefix_tokens, sequence.cached, sequence.done = prefix, shared, cached, shared
        else:
            neighbour, shared = self._neighbour(sequence.owner, sequence.head)
            if neighbour is not None:
                self._context.share(neighbour.slot, sequence.slot, shared)
            sequence.cached = sequence.done = shared
        self.running[sequence.slot] = sequence

    def end(self, sequence: LlamaSequence) -> None:
        """Forget what a running sequence has here; no more than a slot is held by one that is embedded."""
        if self.running.pop(sequence.slot, None) is not None:
            self._context.drop(sequence.slot)
            if sequence.prefix is not None:
                sequence.prefix.users -= 1

    def _neighbour(self, owner: str, tokens: Tokens) -> tuple[LlamaSequence | None, int]:
        """The owner's running sequence that has computed most of ``tokens``, and how many."""
        best, shared = None, LEAST_TOKENS - 1
        for running in self.running.values() if self._shares else ():
            if running.owner != owner:
                continue
            length = min(running.done, common_length(running.prompt, tokens))
            if length > shared and self._context.can_share(running.slot, length):
                best, shared = running, length
        return best, shared if best else 0

    def make(self, cells: int, waiting: Waiting, keep: LlamaPrefix | None = None) -> bool:
        """Whether ``cells`` are free, after forgetting prefixes that no sequence uses if need be."""
        while self.used_cells + cells > self._context.cells:
            if not self.prefixes.forget_one(_prompts(waiting), keep):
                return False
        return True

    def give_up_prefixes(self, waiting: Waiting) -> bool:
        """A pass found no memory: forget a prefix, or all when nothing runs. False when there is none to forget."""
        if self.prefixes.forget_one(_prompts(waiting)):
            return True
        if self.running:
            return False
        self.prefixes.forget_all()
        for each in waiting:
            each.shared = 0
        return True


def _prompts(waiting: Waiting) -> Iterable[tuple[str, Tokens]]:
    """Those that wait, with their owners: a prefix is worth what it saves them."""
    return ((each.owner, each.prompt) for each in waiting)
