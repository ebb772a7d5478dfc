"""Rows that say the same thing more than once: repetitions of a row, and rows of one input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Truths = NDArray[np.bool_]
Interval = tuple[float, float]

#: Draws of a bootstrap, and its seed: the same rows have the same interval.
DRAWS = 1000
SEED = 20_260_101

#: Draws that are held at a time.
AT_ONCE = 250

#: Most clusters that are drawn one by one; of more, some are drawn together.
MOST_DRAWN = 400


@dataclass(frozen=True, slots=True)
class Clusters:
    """Each row's cluster, as numbers from 0. ``index``: (rows,); ``count``: how many clusters there are."""

    index: Ints
    count: int

    @classmethod
    def of(cls, keys: NDArray[np.int64]) -> Clusters:
        """Equal keys are one cluster. Clusters are numbered in the order in which they first occur."""
        _, first, index = np.unique(keys, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return cls(rank[index], len(first))

    @classmethod
    def alone(cls, rows: int) -> Clusters:
        """Every row is a cluster of its own."""
        return cls(np.arange(rows), rows)

    def at(self, chosen: Truths | Ints) -> Clusters:
        """The clusters of some of the rows."""
        return Clusters.of(self.index[chosen])

    def sums(self, values: Floats) -> Floats:
        """The sum of each cluster's values: (count,)."""
        found: Floats = np.bincount(self.index, values, self.count).astype(np.float64)
        return found

    @property
    def sizes(self) -> Floats:
        found: Floats = np.bincount(self.index, minlength=self.count).astype(np.float64)
        return found

    @property
    def copies(self) -> float:
        """Rows of the cluster that a row lies in, on average (Kish 1965): the largest design effect that there can be.

        1 where every row is a cluster of its own; 0 of no rows.
        """
        sizes = self.sizes
        return float((sizes**2).sum() / max(sizes.sum(), 1))

    @property
    def effective(self) -> float:
        """How many clusters of one size would tell as much, if copies told nothing."""
        return len(self.index) / self.copies if len(self.index) else 0.0

    def few(self) -> Clusters:
        """At most MOST_DRAWN clusters, to be drawn: more are put together at random, because rows may be sorted."""
        if self.count <= MOST_DRAWN:
            return self
        group = np.random.default_rng(SEED).permutation(self.count) % MOST_DRAWN
        return Clusters(group[self.index], MOST_DRAWN)

    def table(self, cell: Ints, cells: int) -> Floats:
        """How many rows of each cluster lie in each cell: (count, cells). ``cell``: each row's, from 0."""
        found = np.bincount(self.index * cells + cell, minlength=self.count * cells)
        return found.reshape(self.count, cells).astype(np.float64)


def drawn(sums: Floats, of: Callable[[Floats], Mapping[str, Floats]]) -> dict[str, Floats]:
    """Each figure that ``of`` gives for counts of shape (drawings, columns), over DRAWS drawings of the clusters.

    ``sums``: the counts of each cluster, (clusters, columns). Clusters are drawn with repetition; those with the same
    counts are drawn as one kind, which is as likely as there are many of it.
    """
    generator = np.random.default_rng(SEED)
    kinds, sizes = np.unique(sums, axis=0, return_counts=True)
    shares = sizes / len(sums)
    parts = [of(generator.multinomial(len(sums), shares, size=AT_ONCE) @ kinds) for _ in range(DRAWS // AT_ONCE)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
