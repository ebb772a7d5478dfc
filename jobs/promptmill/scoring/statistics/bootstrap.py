"""Intervals of figures of counts, such as F1 or kappa, by drawing clusters of rows with replacement."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from promptmill.scoring.statistics.clusters import DRAWS, SEED, Clusters, Floats, Interval, Ints, drawn


def intervals(
    cell: Ints, cells: int, clusters: Clusters, of: Callable[[Floats], Mapping[str, Floats]], level: float = 0.95
) -> dict[str, Interval]:
    """The percentile interval of each figure that ``of`` gives for counts of shape (drawings, cells).

    ``cell``: the cell that each row counts in, from 0; cells without a row are what might have been seen. Where no
    drawing changes a figure, as in a perfect run, one row more is assumed, somewhere among the unseen cells in which it
    would change the figure: of a rate this is the rule of three (Hanley and Lippman-Hand 1983), near enough.
    """
    few = clusters.few()
    table = few.table(cell, cells)
    counts = table.sum(axis=0)
    point = of(counts[None])
    found, still = {}, []
    for name, values in drawn(table, of).items():
        low, high = _within(values, level)
        if low < high:
            found[name] = (low, high)
        else:
            still.append(name)
    empty = np.flatnonzero(counts == 0)
    if not still or not len(empty):
        return found
    one_more = of(counts + np.eye(cells)[empty])
    for name in still:
        value = float(point[name][0])
        telling = empty[one_more[name] != value]
        if len(telling):
            kept = np.union1d(np.flatnonzero(counts), telling)
            rows = np.where(counts[kept] == 0, 1.0 / len(telling), counts[kept] / clusters.copies)
            shares = np.zeros((DRAWS, cells))
            shares[:, kept] = np.random.default_rng(SEED).dirichlet(rows, DRAWS) * counts.sum()
            low, high = _within(of(shares)[name], level)
            found[name] = (min(low, value), max(high, value))
    return found


def _within(values: Floats, level: float) -> Interval:
    low, high = np.percentile(values, (50 * (1 - level), 50 * (1 + level)))
    return float(low), float(high)
