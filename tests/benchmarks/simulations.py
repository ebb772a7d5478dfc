"""How often intervals cover and tests are wrong, by simulation: the table of docs/coverage.md.

python tests/benchmarks/simulations.py [--draws 2000] [--write]

With ``--write`` the page is made anew. Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from promptmill.scoring.scorers.aggregates import class_figures
from promptmill.scoring.statistics import bootstrap, calibration, paired, ranking, unpaired
from promptmill.scoring.statistics.clusters import Clusters
from promptmill.scoring.statistics.means import share_interval

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

HEAD = """# Coverage

How often intervals of 95 % hold the truth, and how often a test at 5 % calls a change where there is none. Made by
`python tests/benchmarks/simulations.py --draws {draws} --write`, with {draws:,} draws of each line; a share of 95 % is
then known to within 1 point. [metrics.md](metrics.md#intervals) names the methods.

Few rows of a sure model are the hardest case: a mistake in 20 rows is often not among them, and its interval can only
say so. Accuracy of very few rows takes few values, so its coverage goes in steps.
"""

#: One simulated case: its name, and a draw that gives whether the interval covered, or the test rejected.
Case = tuple[str, Callable[[np.random.Generator], bool | None]]


def copies(rows: int, times: int) -> Clusters:
    return Clusters(np.repeat(np.arange(rows), times), rows)


def doubled(rows: int, generator: np.random.Generator) -> Clusters:
    """One row in eight has one to seven copies."""
    sizes = np.where(np.arange(rows) < rows // 8, generator.integers(2, 9, rows), 1)
    return Clusters(np.repeat(np.arange(rows), sizes), rows)


def accuracy(rows: int, rate: float, times: int | None) -> Case:
    def draw(generator: np.random.Generator) -> bool:
        clusters = doubled(rows, generator) if times is None else copies(rows, times)
        right = (generator.random(rows) < rate).astype(np.float64)[clusters.index]
        low, high = share_interval(right, clusters) or (0.0, 0.0)
        return low <= rate <= high

    return f"accuracy {rate:g}, {rows} inputs, {_copies(times)}", draw


def brier(rows: int, wrong: float) -> Case:
    """A model that says 0.99 or 0.01 and is wrong in a share of rows."""
    truth = wrong * 0.99**2 + (1 - wrong) * 0.01**2

    def draw(generator: np.random.Generator) -> bool:
        squares = np.where(generator.random(rows) < wrong, 0.99**2, 0.01**2)
        low, high = share_interval(squares, Clusters.alone(rows)) or (0.0, 0.0)
        return low <= truth <= high

    return f"Brier score, sure and wrong in {100 * wrong:g} %, {rows} rows", draw


def area(yes: int, no: int, truth: float, times: int = 1) -> Case:
    apart = norm.ppf(truth) * 2**0.5

    def draw(generator: np.random.Generator) -> bool:
        clusters = copies(yes + no, times)
        is_yes = np.arange(yes + no) < yes
        sure = generator.normal(apart * is_yes)[clusters.index]
        low, high = ranking.auc_interval(sure, is_yes[clusters.index], clusters) or (0.0, 1.0)
        return low <= truth <= high

    return f"AUC {truth:g}, {yes} yes of {yes + no}, {_copies(times)}", draw


def ece(rows: int, factor: float, times: int = 1) -> Case:
    """Log odds that are ``factor`` times the true ones."""
    chances = np.random.default_rng(0).beta(2, 2, 400_000)
    said = 1 / (1 + np.exp(-factor * np.log(chances / (1 - chances))))
    order = np.array_split(np.argsort(said), calibration.BINS)
    truth = float(np.mean([abs(said[part].mean() - chances[part].mean()) for part in order]))

    def draw(generator: np.random.Generator) -> bool:
        clusters = copies(rows, times)
        chance = generator.beta(2, 2, rows)
        is_yes = generator.random(rows) < chance
        sure = 1 / (1 + np.exp(-factor * np.log(chance / (1 - chance))))
        low, high = calibration.error_interval(calibration.bins(sure[clusters.index], is_yes[clusters.index], clusters))
        return low <= truth + 1e-3 and high >= truth

    return f"calibration error {truth:.3f}, {rows} inputs, {_copies(times)}", draw


def macro_f1(rows: int, times: int) -> Case:
    truth = np.array([[0.40, 0.05, 0.05], [0.05, 0.20, 0.05], [0.02, 0.03, 0.15]])
    f1 = float((2 * truth.diagonal() / (truth.sum(axis=0) + truth.sum(axis=1))).mean())
    wanted, given = np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3)

    def draw(generator: np.random.Generator) -> bool:
        clusters = copies(rows, times)
        cell = generator.choice(9, size=rows, p=truth.ravel())[clusters.index]
        found = bootstrap.intervals(cell, 9, clusters, lambda drawn: class_figures(drawn, wanted, given, 3))
        low, high = found["macro_f1"]
        return low <= f1 <= high

    return f"macro F1 {f1:.3f}, {rows} inputs, {_copies(times)}", draw


def no_change(rows: int, times: int | None, sampled: bool = False) -> Case:
    """Two runs of one quality, of which a fifth of the rows changes by chance."""

    def draw(generator: np.random.Generator) -> bool:
        clusters = doubled(rows, generator) if times is None else copies(rows, times)
        before = generator.random(rows) < 0.8
        after = np.where(generator.random(rows) < 0.2, generator.random(rows) < 0.8, before)
        one, two = before[clusters.index], after[clusters.index]
        if sampled:
            one, two = (_noisy(each, generator) for each in (one, two))
        p = paired.rates(one, two, clusters).p
        return p is not None and p < 0.05

    what = "sampled " if sampled else ""
    return f"McNemar over {what}accuracy 0.8, {rows} inputs, {_copies(times)}", draw


def _noisy(right: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
    """Each copy is drawn anew in 15 % of cases."""
    return np.where(generator.random(len(right)) < 0.15, generator.random(len(right)) < 0.8, right)


def moods(spread: float, slowdown: float = 0.0) -> Case:
    def draw(generator: np.random.Generator) -> bool:
        before, after = np.exp(generator.normal(0, spread, (2, 5)))
        p = unpaired.runs(before.tolist(), (after * (1 + slowdown)).tolist()).p
        return p is not None and p < 0.05

    slower = f"{100 * slowdown:g} % slower, " if slowdown else ""
    return f"five runs each, {slower}{100 * spread:g} % from run to run", draw


def same_area(yes: int, no: int) -> Case:
    def draw(generator: np.random.Generator) -> bool:
        is_yes = np.arange(yes + no) < yes
        common = generator.normal(1.2 * is_yes, 0.7)
        one, two = (common + generator.normal(0, 0.7, yes + no) for _ in range(2))
        p = paired.areas(one, two, is_yes, Clusters.alone(yes + no)).p
        return p is not None and p < 0.05

    return f"AUC of two models, {yes} yes of {yes + no}", draw


def _copies(times: int | None) -> str:
    return "some doubled" if times is None else "once each" if times == 1 else f"{times} times each"


def cases() -> Iterator[tuple[str, list[Case]]]:
    repeats: list[int | None] = [1, 2, 4, 8, None]
    yield "covered by the 95 % interval", [
        *(accuracy(60, 0.8, times) for times in repeats),
        *(accuracy(rows, rate, 1) for rows in (10, 30, 300) for rate in (0.5, 0.95)),
        *(brier(rows, 0.05) for rows in (10, 30, 100, 300)),
        *(area(*each) for each in ((6, 294, 0.75), (6, 294, 0.9), (10, 90, 0.9), (60, 60, 0.76))),
        area(6, 294, 0.75, 4),
        *(ece(rows, factor) for rows in (30, 100, 300) for factor in (1.0, 2.0)), ece(100, 2.0, 4),
        macro_f1(100, 1), macro_f1(100, 4),
    ]  # fmt: skip
    yield "called a change where there is none", [
        *(no_change(60, times) for times in repeats), no_change(300, 1), no_change(60, 4, sampled=True),
        same_area(6, 294), same_area(60, 60), *(moods(spread) for spread in (0.0, 0.01, 0.02, 0.05)),
    ]  # fmt: skip
    yield "called a change where there is one", [moods(0.01, 0.05)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    lines = ["| simulated | share |", "|---|---|"]
    for title, group in cases():
        lines.append(f"| **{title}** | |")
        for number, (name, draw) in enumerate(group):
            generator = np.random.default_rng(number)
            share = sum(bool(draw(generator)) for _ in range(arguments.draws)) / arguments.draws
            lines.append(f"| {name} | {100 * share:.1f} % |")
            print(lines[-1], flush=True)
    if arguments.write:
        PAGE.write_text("\n".join([HEAD.format(draws=arguments.draws), *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
