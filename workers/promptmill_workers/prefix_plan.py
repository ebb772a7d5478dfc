"""Which prompt prefixes are worth computing once: a plan over all waiting prompts, in token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

#: Shorter prefixes are not shared: a few tokens cost less than a step of their own.
LEAST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Prompts that share their first ``length`` tokens. ``members`` are indices into what was planned."""

    length: int
    members: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that need not be computed when the prefix is computed once."""
        return self.length * (len(self.members) - 1)


def common_length(a: Tokens, b: Tokens) -> int:
    """Tokens that two prompts have in common at their start."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


def plan(prompts: Sequence[Tokens], least: int = LEAST_TOKENS) -> list[PrefixGroup]:
    """The partition of the prompts into groups that saves the most tokens; prompts that share nothing are left out.

    In sorted order the prompts that share a prefix stand together. The longest common prefixes of neighbours span a
    tree of such runs; a run is kept whole when that saves more than its branches do. The last token of a prompt is
    never shared: its logits are needed.
    """
    order = sorted(range(len(prompts)), key=lambda index: _sortable(prompts[index]))
    heads = [prompts[index][:-1] for index in order]
    shared = [common_length(a, b) for a, b in pairwise(heads)]
    return [
        PrefixGroup(length, tuple(sorted(order[first : last + 1])))
        for length, first, last in _best(shared, 0, len(order) - 1, least)
    ]


def _sortable(tokens: Tokens) -> bytes:
    """Bytes that sort as the token ids do."""
    return tokens.astype(">u4").tobytes()


def _best(shared: list[int], first: int, last: int, least: int) -> list[tuple[int, int, int]]:
    """Groups (length, first, last) of the sorted prompts ``first`` to ``last``; an explicit stack bounds the depth.

    Each run is visited after its branches, so that the two can be compared.
    """
    found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    stack = [(first, last, False)]
    while stack:
        low, high, visited = stack.pop()
        if low >= high:
            found[low, high] = []
            continue
        length = min(shared[low:high])
        branches = _branches(shared, low, high, length)
        if not visited:
            stack.append((low, high, True))
            stack.extend((a, b, False) for a, b in branches)
            continue
        inner = [group for branch in branches for group in found.pop(branch)]
        whole = length * (high - low)
        apart = sum(size * (end - start) for size, start, end in inner)
        found[low, high] = [(length, low, high)] if length >= least and whole >= apart else inner
    return found.get((first, last), [])


def _branches(shared: list[int], low: int, high: int, length: int) -> list[tuple[int, int]]:
    """The run cut where neighbours share no more than ``length``."""
    cuts = [index for index in range(low, high) if shared[index] == length]
    starts, ends = [low, *[cut + 1 for cut in cuts]], [*cuts, high]
    return list(zip(starts, ends, strict=True))
