"""The same rows judged twice: which ones flipped, and whether that is more than chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def flips(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[Ints, Ints]:
    """Places of the rows that only the first has right, and of those that only the second has. NaN is not counted."""
    both = np.isfinite(before) & np.isfinite(after)
    lost, won = both & (before == 1) & (after != 1), both & (before != 1) & (after == 1)
    return np.flatnonzero(lost), np.flatnonzero(won)


def mcnemar(losses: int, gains: int) -> float | None:
    """The p-value of McNemar's exact test: whether the flips are as many one way as the other; None of no flip."""
    if losses + gains == 0:
        return None
    from scipy.stats import binomtest

    return float(binomtest(losses, losses + gains, 0.5).pvalue)
