"""Repetitions of a row become one value: a vote, or whether any or all of k answers would be right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from promptmill.scoring.statistics.clusters import Clusters, Floats

#: What ``repeats`` of a score may say.
FORM = re.compile(r"mean|majority|pass[@^][1-9]\d{0,3}")


def majority(right: float, answers: float, k: int) -> float:
    """1 where most answers are right, 1/2 where half of them are."""
    return 0.5 if 2 * right == answers else float(2 * right > answers)


def pass_at(right: float, answers: float, k: int) -> float:
    """The chance that one of k drawn answers is right: 1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021)."""
    return 1 - math.comb(int(answers - right), k) / math.comb(int(answers), k)


def pass_all(right: float, answers: float, k: int) -> float:
    """The chance that all of k drawn answers are right: C(c, k) / C(n, k), unbiased (Yao et al. 2024)."""
    return math.comb(int(right), k) / math.comb(int(answers), k)


#: What stands before the number -> the figure that it makes, and how.
REDUCERS: Mapping[str, tuple[str, Callable[[float, float, int], float]]] = {
    "majority": ("majority_vote", majority),
    "pass@": ("pass_at_k", pass_at),
    "pass^": ("pass_all_k", pass_all),
}


def reducer_of(repeats: str) -> str | None:
    """The key of REDUCERS; None for the mean, which takes each answer as it is."""
    return next((name for name in REDUCERS if repeats.startswith(name)), None)


def reduced(repeats: str, right: Floats, clusters: Clusters) -> tuple[Floats, int]:
    """A value for each row that was repeated, and how many rows have too few answers for one.

    ``right``: 1 or 0 for each answer; ``clusters``: answers to one input.
    """
    name = reducer_of(repeats)
    assert name is not None
    k = int(repeats[len(name) :] or 1)
    pairs = list(zip(clusters.sums((right == 1).astype(np.float64)), clusters.sizes, strict=True))
    enough = [pair for pair in pairs if pair[1] >= k]
    return np.array([REDUCERS[name][1](*pair, k) for pair in enough]), len(pairs) - len(enough)
