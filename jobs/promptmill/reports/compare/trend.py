"""The history of figures over the jobs of a tag, and where it changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from sqlalchemy.engine import Engine

from promptmill.core.registry import suggestion
from promptmill.errors import PromptmillError
from promptmill.reports.figures.columns import Floats
from promptmill.reports.figures.figures import metric_of, names_of, value_of
from promptmill.reports.figures.metrics import Better, Metric
from promptmill.reports.figures.summary import Summary, summarise
from promptmill.reports.render import markdown
from promptmill.reports.render.csv import lines
from promptmill.reports.render.json import dumped
from promptmill.store.tags import tagged

#: Fewest jobs on either side of a change: fewer do not tell it from noise.
LEAST_SIDE = 4

#: Shuffles of the history, and the share of them that may show as strong a change as the true order.
SHUFFLES = 999
LEVEL = 0.01
SEED = 20_260_101


@dataclass(frozen=True, slots=True)
class Point:
    """One job. ``value`` None: not measured. ``change``: of the mean from here on against before; None: none here."""

    job_id: str
    name: str | None
    at: float
    completeness: str
    value: float | None
    change: float | None = None
    word: str = ""


@dataclass(frozen=True, slots=True)
class Trend:
    """One figure over the jobs of a tag, the oldest first."""

    tag: str
    name: str
    metric: Metric
    points: tuple[Point, ...]

    @property
    def in_points(self) -> bool:
        return self.metric.unit == "%"

    def to_json(self) -> dict[str, Any]:
        return {
            "tag": self.tag, "figure": self.name, "unit": str(self.metric.unit),
            "change_unit": "points" if self.in_points else "share",
            "points": [{name: getattr(each, name) for name in Point.__slots__} for each in self.points],
        }  # fmt: skip


def trends(db: Engine, tag: str, names: Sequence[str], limit: int = 50) -> list[Trend]:
    """Each of ``names`` over the newest ``limit`` jobs of the tag. Raises PromptmillError for a figure none has."""
    summaries = [summarise(db, job.id) for job in tagged(db, tag)[-limit:]]
    return [_trend(tag, name, summaries) for name in names]


def _trend(tag: str, name: str, summaries: list[Summary]) -> Trend:
    known = {each for summary in summaries for each in names_of(summary)}
    if name not in known:
        raise PromptmillError(f"there is no figure '{name}'", hint=suggestion(name, sorted(known)))
    metric = metric_of(name)
    points = [_point(name, each) for each in summaries]
    # A job that is not complete did other work: it is shown, and takes no part.
    places = [place for place, (point, each) in enumerate(zip(points, summaries, strict=True))
              if point.value is not None and each.complete]  # fmt: skip
    values = np.array([points[place].value for place in places], dtype=np.float64)
    for split, begin, end in change_points(values):
        before, after = float(values[begin:split].mean()), float(values[split:end].mean())
        change = after - before if metric.unit == "%" else (after / before - 1 if before else math.inf)
        good = (after > before) == (metric.better is Better.HIGHER)
        word = "" if metric.better is Better.NEITHER else "better" if good else "worse"
        shown = change if math.isfinite(change) else None
        points[places[split]] = replace(points[places[split]], change=shown, word=word)
    return Trend(tag, name, metric, tuple(points))


def _point(name: str, summary: Summary) -> Point:
    try:
        value = value_of(summary, name)
    except KeyError:
        value = None
    return Point(summary.job_id, summary.name, summary.submitted_at, summary.completeness, value)


def change_points(values: Floats) -> list[tuple[int, int, int]]:
    """(first place after a change, begin and end of the stretch it divides), by place.

    The split with the largest difference of means, measured by the noise on both sides, is a change when fewer than
    LEVEL of SHUFFLES random orders of the same values show one as large; then both sides are looked at again.
    """
    found = _divided(values, 0, np.random.default_rng(SEED))
    edges = [0, *sorted(found), len(values)]
    return [(edges[index], edges[index - 1], edges[index + 1]) for index in range(1, len(edges) - 1)]


def _divided(values: Floats, offset: int, generator: np.random.Generator) -> list[int]:
    if len(values) < 2 * LEAST_SIDE:
        return []
    split, strength = _best_split(values)
    above = sum(_best_split(generator.permutation(values))[1] >= strength for _ in range(SHUFFLES))
    if (above + 1) / (SHUFFLES + 1) > LEVEL:
        return []
    left, right = values[:split], values[split:]
    return [*_divided(left, offset, generator), offset + split, *_divided(right, offset + split, generator)]


def _best_split(values: Floats) -> tuple[int, float]:
    """The split between LEAST_SIDE values on either side with the largest sum of squares between the sides."""
    count = len(values)
    places = np.arange(LEAST_SIDE, count - LEAST_SIDE + 1)
    sums = np.cumsum(values)
    left, right = sums[places - 1] / places, (sums[-1] - sums[places - 1]) / (count - places)
    strength = places * (count - places) / count * (left - right) ** 2
    best = int(np.argmax(strength))
    return int(places[best]), float(strength[best])


COLUMNS = ("job", "submitted", "value", "unit", "", "change")


def cells(trend: Trend) -> list[tuple[str, str, str, str, str, str]]:
    """A row for each job: what tables of any form show."""
    top = max((each.value for each in trend.points if each.value is not None), default=0.0)
    rows = []
    for each in trend.points:
        bar = "█" * round(20 * each.value / top) if each.value is not None and top > 0 else ""
        change = "" if each.change is None else f"{100 * each.change:+.1f} {'pp' if trend.in_points else '%'}"
        marks = " ".join(part for part in (change, each.word) if part)
        if each.completeness != "complete":
            marks = f"{each.completeness} {marks}".rstrip()
        shown = trend.metric.text(each.value)
        submitted = f"{datetime.fromtimestamp(each.at, UTC):%Y-%m-%d %H:%M}"
        rows.append((each.name or each.job_id, submitted, shown, trend.metric.shown_unit, bar, marks))
    return rows


def text(found: Sequence[Trend], format_: str) -> str:
    """All trends as ``md``, ``json`` or ``csv``."""
    if format_ == "json":
        return dumped([each.to_json() for each in found])
    if format_ == "md":
        return (
            "\n\n".join(f"## {each.tag}: {each.name}\n\n{markdown.table(COLUMNS, cells(each))}" for each in found)
            + "\n"
        )
    names = Point.__slots__
    rows = (
        (trend.tag, trend.name, *(getattr(each, name) for name in names)) for trend in found for each in trend.points
    )
    return lines(("tag", "figure", *names), rows)
