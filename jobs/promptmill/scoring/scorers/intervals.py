"""Intervals of rates and means."""

from __future__ import annotations

from statistics import NormalDist


def mean_interval(
    total: float, squares: float, n: int, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float] | None:
    """The 95 % interval of Student's t of a mean of values within ``bounds``; None of fewer than two, or equal ones.

    ``total`` and ``squares`` are the sums of the ``n`` values and of their squares.
    """
    if n < 2:
        return None
    from scipy.special import stdtrit

    mean = total / n
    # Equal values say nothing of how far the next one may be: no interval rather than one without width.
    deviation = (max(0.0, squares - n * mean * mean) / (n - 1)) ** 0.5
    if deviation <= 1e-9 * abs(mean):
        return None
    half = float(stdtrit(n - 1, 0.975)) * deviation / n**0.5
    return max(bounds[0], mean - half), min(bounds[1], mean + half)


def wilson(successes: int, n: int) -> tuple[float, float] | None:
    """The 95 % Wilson interval of the rate ``successes / n``; None of nothing."""
    if n == 0:
        return None
    # Wilson (1927). SciPy has it, but its statistics take more than a second to import, and every report has a rate.
    z = NormalDist().inv_cdf(0.975)
    rate = successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)
