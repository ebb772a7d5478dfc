"""Which prompt prefixes are worth computing once: plans over all waiting prompts, in token ids.

In sorted order the prompts that share a prefix stand together. The common lengths of neighbours span a tree of such
runs, found in one pass; ``plan`` and ``plan_nested`` choose from that tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class NestedPlan:
    """For engines whose prefixes can continue one another at no cost."""

    #: The tokens that each prompt has in common with another one and that are worth sharing.
    shared: list[int]
    #: The prompts with those that share a prefix brought together, else in the order they came.
    order: list[int]


@dataclass(slots=True)
class _Run:
    """Sorted prompts ``low`` to ``high`` share ``length`` tokens; runs of them share more."""

    length: int
    low: int
    high: int = 0
    inner: list[int] = field(default_factory=list)


def common_length(a: Tokens, b: Tokens) -> int:
    """Tokens that two prompts have in common at their start."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


def plan(
    prompts: Sequence[Tokens], least: int = LEAST_TOKENS, owners: Sequence[str] | None = None
) -> list[PrefixGroup]:
    """The partition of the prompts into groups that saves the most tokens; prompts that share nothing are left out.

    ``owners``: of each prompt; prompts of two owners share nothing. None: all have one.

    The last token of a prompt is never shared: its logits are needed.
    """
    order, runs = _tree(prompts, owners)
    saved: list[int] = []
    whole: list[bool] = []
    for run in runs:
        apart = sum(saved[index] for index in run.inner)
        together = run.length * (run.high - run.low) if run.length >= least else -1
        whole.append(together >= apart)
        saved.append(max(together, apart))
    return [
        PrefixGroup(run.length, tuple(sorted(order[run.low : run.high + 1])))
        for run in _outermost(runs, whole)
    ]  # fmt: skip


def plan_nested(
    prompts: Sequence[Tokens], least: int = LEAST_TOKENS, owners: Sequence[str] | None = None
) -> NestedPlan:
    """Each prompt shares the longest prefix that another prompt of its owner has too.

    A prefix that is less than ``least`` tokens longer than the one it continues is not worth its sequence.
    """
    order, runs = _tree(prompts, owners)
    shared = [0] * len(prompts)
    together: list[tuple[int, ...]] = [()] * len(prompts)
    for run in reversed(runs):  # a run comes before what is inside it
        members = order[run.low : run.high + 1]
        if run.length - shared[members[0]] >= least:
            first = min(members)
            for member in members:
                shared[member] = run.length
                together[member] += (first,)
    return NestedPlan(shared, sorted(range(len(prompts)), key=lambda index: (*together[index], index)))


def _tree(prompts: Sequence[Tokens], owners: Sequence[str] | None) -> tuple[list[int], list[_Run]]:
    """The prompts' indices in sorted order, and the runs of two or more, inner ones first."""
    own = owners or [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: (own[index], _sortable(prompts[index])))
    lengths = [common_length(prompts[a][:-1], prompts[b][:-1]) if own[a] == own[b] else 0 for a, b in pairwise(order)]
    return order, _runs(lengths)


def _sortable(tokens: Tokens) -> bytes:
    """Bytes that sort as the token ids do."""
    return tokens.astype(">u4").tobytes()


def _runs(shared: Sequence[int]) -> list[_Run]:
    """The runs by the common lengths of neighbours. ``open_runs`` are nested, the innermost last."""
    closed: list[_Run] = []
    open_runs: list[_Run] = []
    for index, length in enumerate([*shared, -1]):
        low, inner = index, -1
        while open_runs and open_runs[-1].length > length:
            run = open_runs.pop()
            run.high, low = index, run.low
            if inner >= 0:
                run.inner.append(inner)
            closed.append(run)
            inner = len(closed) - 1
        if not open_runs or open_runs[-1].length < length:
            open_runs.append(_Run(length, low))
        if inner >= 0:
            open_runs[-1].inner.append(inner)
    return closed


def _outermost(runs: Sequence[_Run], chosen: Sequence[bool]) -> list[_Run]:
    """The chosen runs that are inside no other chosen one."""
    found: list[_Run] = []
    covered = [False] * len(runs)
    for index in reversed(range(len(runs))):
        if chosen[index] and not covered[index]:
            found.append(runs[index])
        for inner in runs[index].inner:
            covered[inner] = covered[index] or chosen[index]
    return found[::-1]
