"""The rows of a job folded into what a report prints, in one pass and in memory that does not grow with the job."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.arrow_tables import is_as_it_was, is_worth
from promptmill.reports.figures import percentiles
from promptmill.reports.figures.columns import Floats, Ints, Key, Places, Series, Tokens, Truths, UnknownKey, parted
from promptmill.reports.figures.distributions import CURVE_SLICES, Active, Curve, Spread, add_output, queued, tpot
from promptmill.reports.figures.percentiles import Times
from promptmill.reports.figures.row_sources import ArrowRows, NativeRows, RowSource

#: Seconds by which a worker's reading of the database's clock may be off before a row counts as out of order: SQLite's
#: ticks in milliseconds, and half of the time that a busy database takes to answer is a few more.
CLOCK_TOLERANCE_S = 0.010


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a job's rows. Tokens are of answers, without those copied from an identical request."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    #: Answers that were copied from an identical request: they are in no sum of tokens.
    copied: int = 0
    over_max_tokens: int = 0
    over_cached: int = 0
    #: Rows whose stamps of one worker are out of order.
    disordered: int = 0
    #: Rows admitted before they were enqueued, by more than clocks may disagree.
    early: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def totals_of(series: Series, tokens: Tokens, ok: Truths) -> Totals:
    """Sums over some rows; ``ok``: which of them have an answer."""
    computed = ok & ~tokens.is_copy
    order = (series.first_token_at < series.admitted_at) | (series.finished_at < series.first_token_at)

    def summed(column: Floats) -> int:
        return int(column[computed & (column > 0)].sum())

    return Totals(
        prompt_tokens=summed(tokens.prompt),
        cached_tokens=summed(tokens.cached),
        reasoning_tokens=summed(tokens.reasoning),
        copied=int((ok & tokens.is_copy).sum()),
        over_max_tokens=int(((tokens.most >= 0) & (tokens.output > tokens.most)).sum()),
        over_cached=int(((tokens.prompt >= 0) & (tokens.cached > tokens.prompt)).sum()),
        disordered=int(order.sum()),
        early=int((series.enqueued_at > series.admitted_at + CLOCK_TOLERANCE_S).sum()),
    )


#: Slices of plots over time, and points of the scatter plot: more are a blot, and megabytes.
PLOT_SLICES = 240
SCATTER = 1500


@dataclass(frozen=True, slots=True)
class Group:
    """Sums over the rows of one worker, state, finish reason and error class. ``timed`` rows had a slot."""

    worker_id: str | None
    state: str
    finish_reason: str | None
    error_class: str | None
    rows: int
    timed: int
    output_tokens: int
    first_admitted_at: float | None
    last_finished_at: float | None


@dataclass(frozen=True, slots=True)
class Plots:
    """What only plots show. Each column has PLOT_SLICES values; the scatter is of a sample of rows."""

    slice_s: float
    output_tps: Floats
    prefill_tps: Floats
    active: Floats
    waiting: Floats
    scatter_tokens: Floats
    scatter_latency_s: Floats
    latency: Times
    latency_edges: Floats
    latency_counts: Floats
    rows: int
    active_by_worker: dict[str, Floats]


@dataclass(frozen=True, slots=True)
class Folded:
    """Everything that comes from single rows. None: no row had a slot."""

    groups: tuple[Group, ...] = ()
    began_at: float | None = None
    ended_at: float | None = None
    timed: int = 0
    active_s: float = 0.0
    peak_active: int = 0
    latency_s: percentiles.Distribution = field(default_factory=lambda: percentiles.Distribution(0))
    ttft_s: percentiles.Distribution = field(default_factory=lambda: percentiles.Distribution(0))
    tpot_s: percentiles.Distribution = field(default_factory=lambda: percentiles.Distribution(0))
    queue_s: percentiles.Distribution = field(default_factory=lambda: percentiles.Distribution(0))
    curve: Curve | None = None
    totals: Totals = field(default_factory=Totals)
    plots: Plots | None = None


def fold(db: Connection, job: sa.Row[Any], detailed: bool = False) -> Folded:
    """Read the job once; ``detailed``: what plots need, too."""
    sources: list[RowSource] = [NativeRows(db, job.id)]
    if is_worth(db.engine, job.state, job.rows):
        sources.insert(0, ArrowRows(db, job.id))
    for source in sources:
        for places in (Places.of, Places.scanned):
            # A job that was retried meanwhile may have rows of workers that were not known.
            with suppress(UnknownKey):
                folded = _fold(source, places(db, job.id), job.rows, detailed)
                if isinstance(source, NativeRows) or is_as_it_was(db.engine, job):
                    return folded
                break
    raise UnknownKey


def _fold(source: RowSource, places: Places, rows: int, detailed: bool) -> Folded:
    known = places.keys
    counts = _Counts(known)
    exact = rows <= percentiles.EXACT_ROWS
    plotted = places.workers if detailed else None
    shape = None if exact else _Shape.over(source.began_and_ended(), rows, False, plotted)
    held = _Held()
    answered = np.array([key.state == "ok" for key in known], dtype=bool)
    totals = Totals()
    for block in source.blocks(places):
        at, series, tokens = parted(block)
        totals += totals_of(series, tokens, answered[at])
        if detailed:
            series = replace(series, worker=places.worker_of(at))
        else:
            series = replace(series, prefill_tokens=np.empty(0))
        timed = series.timed
        counts.add(at, series, timed)
        at, series = at[timed], series.where(timed)
        ok = answered[at]
        if exact:
            held.ok.append(series.where(ok))
            held.failed.append(series.where(~ok))
        elif shape is not None:
            shape.add(series.where(ok), series.where(~ok))
    if exact:
        shape = held.shape(rows, plotted)
    folded = Folded(groups=counts.groups()) if shape is None else shape.folded(counts.groups())
    return replace(folded, totals=totals)


#: Workers whose rows are plotted; None: nothing is.
Workers = tuple[str | None, ...] | None

#: Rows that are folded at a time: each step makes columns of its own.
STEP_ROWS = 100_000


@dataclass(slots=True)
class _Held:
    """Rows of a job that has so few that all can be held."""

    ok: list[Series] = field(default_factory=list)
    failed: list[Series] = field(default_factory=list)

    def shape(self, rows: int, plotted: Workers) -> _Shape | None:
        """What they make; None of no rows. They are let go."""
        ok, failed = Series.joined(self.ok), Series.joined(self.failed)
        shape = _Shape.over(_span_of(ok, failed), rows, True, plotted)
        if shape is None:
            return None
        shape.add_active(ok, failed)
        for first in range(0, len(ok), STEP_ROWS):
            shape.add_times(ok.part(first, first + STEP_ROWS), failed.part(0, 0))
        shape.add_times(ok.part(0, 0), failed)
        return shape


def _span_of(*parts: Series) -> tuple[float, float] | None:
    parts = tuple(part for part in parts if len(part))
    if not parts:
        return None
    return min(float(part.admitted_at.min()) for part in parts), max(float(part.finished_at.max()) for part in parts)


class _Counts:
    """Sums for each key."""

    def __init__(self, known: list[Key]) -> None:
        self._known = known
        count = len(known)
        self._rows, self._timed = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self._tokens = np.zeros(count)
        self._first, self._last = np.full(count, np.inf), np.full(count, -np.inf)

    def add(self, places: Ints, series: Series, timed: Truths) -> None:
        count = len(self._known)
        self._rows += np.bincount(places, minlength=count)
        self._timed += np.bincount(places[timed], minlength=count)
        self._tokens += np.bincount(places, series.output_tokens, count)
        # ufunc.at takes half the time of a report.
        keys = places[timed]
        # Numbers of 16 bits are sorted by their digits.
        order = np.argsort(keys.astype(np.min_scalar_type(count)), kind="stable")
        keys = keys[order]
        if not len(keys):
            return
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        for ends, ufunc, column in (
            (self._first, np.minimum, series.admitted_at), (self._last, np.maximum, series.finished_at),
        ):  # fmt: skip
            ends[keys[begins]] = ufunc(ends[keys[begins]], ufunc.reduceat(column[timed][order], begins))

    def groups(self) -> tuple[Group, ...]:
        columns = zip(self._known, self._rows, self._timed, self._tokens, self._first, self._last, strict=True)
        return tuple(
            Group(
                key.worker_id, key.state, key.finish_reason, key.error_class, int(rows), int(timed), int(tokens),
                float(first) if timed else None, float(last) if timed else None,
            )
            for key, rows, timed, tokens, first, last in columns
            if rows
        )  # fmt: skip


class _Shape:
    """Figures of single rows that need to know when the job began and ended."""

    def __init__(self, begin: float, end: float, rows: int, exact: bool, plotted: Workers) -> None:
        self._begin, self._end = begin, end
        self._latency, self._ttft, self._tpot, self._queue = (Times(exact) for _ in range(4))
        self._active = Active(begin, end, exact)
        self._has_time = end > begin
        self._output = Spread(begin, end, CURVE_SLICES) if self._has_time else None
        self._plots = _PlotShape(begin, end, rows, plotted) if plotted is not None and self._has_time else None

    @staticmethod
    def over(span: tuple[float, float] | None, rows: int, exact: bool, plotted: Workers) -> _Shape | None:
        return None if span is None else _Shape(*span, rows, exact, plotted)

    def add(self, ok: Series, failed: Series) -> None:
        self.add_active(ok, failed)
        self.add_times(ok, failed)

    def add_active(self, ok: Series, failed: Series) -> None:
        """Where times are exact, all rows at once."""
        self._active.add(*(np.concatenate([getattr(ok, name), getattr(failed, name)]) for name in _SLOT))

    def add_times(self, ok: Series, failed: Series) -> None:
        latency = ok.finished_at - ok.admitted_at
        self._latency.add(latency)
        self._ttft.add(ok.first_token_at - ok.admitted_at)
        self._tpot.add(tpot(ok))
        self._queue.add(queued(ok))
        if self._output is not None:
            add_output(self._output, ok)
        if self._plots is not None:
            self._plots.add(ok, failed, latency)

    def folded(self, groups: tuple[Group, ...]) -> Folded:
        curve = None
        if self._output is not None and len(self._latency):
            curve = Curve(self._output.slice_s, tuple((self._output.tokens() / self._output.slice_s).tolist()))
        return Folded(
            groups=groups, began_at=self._begin, ended_at=self._end, timed=self._active.rows,
            active_s=self._active.active_s, peak_active=self._active.peak, curve=curve,
            latency_s=self._latency.distribution(), ttft_s=self._ttft.distribution(),
            tpot_s=self._tpot.distribution(), queue_s=self._queue.distribution(),
            plots=self._plots.made(self._latency) if self._plots is not None and len(self._latency) else None,
        )  # fmt: skip


_SLOT = ("admitted_at", "finished_at")


class _PlotShape:
    """Curves over PLOT_SLICES and a sample of rows."""

    def __init__(self, begin: float, end: float, rows: int, workers: tuple[str | None, ...]) -> None:
        self._workers = workers
        self._output, self._prefill = (Spread(begin, end, PLOT_SLICES) for _ in range(2))
        self._active, self._waiting = _Covering(begin, end, len(workers)), _Covering(begin, end)
        self._step = max(1, rows // SCATTER)
        self._seen = 0
        self._sample: list[tuple[Floats, Floats]] = []

    def add(self, ok: Series, failed: Series, latency: Floats) -> None:
        add_output(self._output, ok)
        known = np.isfinite(ok.first_token_at)
        self._prefill.between(ok.admitted_at[known], ok.first_token_at[known], ok.prefill_tokens[known])
        for rows in (ok, failed):
            self._active.add(rows.admitted_at, rows.finished_at, rows.worker)
            queued_rows = np.isfinite(rows.enqueued_at)
            self._waiting.add(rows.enqueued_at[queued_rows], rows.admitted_at[queued_rows])
        first = -self._seen % self._step
        self._sample.append((ok.output_tokens[first :: self._step], latency[first :: self._step]))
        self._seen += len(ok)

    def made(self, latency: Times) -> Plots:
        tokens, seconds = (np.concatenate(column) for column in zip(*self._sample, strict=True))
        top = float(latency.percentiles([99.5])[0])
        counts, edges = latency.histogram(60 if len(latency) > 200 else 20, top or 1.0)
        slice_s, active = self._output.slice_s, self._active.counts()
        lines = zip(self._workers, active, strict=True)
        return Plots(
            slice_s=slice_s, output_tps=self._output.tokens() / slice_s, prefill_tps=self._prefill.tokens() / slice_s,
            active=active.sum(axis=0), waiting=self._waiting.counts()[0], scatter_tokens=tokens,
            scatter_latency_s=seconds, latency=latency, latency_edges=edges, latency_counts=counts,
            rows=len(latency),
            active_by_worker={name: line for name, line in lines if name and line.any()},
        )  # fmt: skip


class _Covering:
    """How many spans of each of some groups cover each slice's end."""

    def __init__(self, begin: float, end: float, groups: int = 1) -> None:
        self._begin, self._slice_s = begin, (end - begin) / PLOT_SLICES
        self._changes = np.zeros((groups, PLOT_SLICES + 1))

    def add(self, begins: Floats, ends: Floats, group: Floats | None = None) -> None:
        first = 0 if group is None else group.astype(np.int64) * (PLOT_SLICES + 1)
        for at, change in ((begins, 1.0), (ends, -1.0)):
            place = np.clip(((at - self._begin) / self._slice_s).astype(np.int64), 0, PLOT_SLICES) + first
            counted = np.bincount(place, minlength=self._changes.size)
            self._changes += change * counted.reshape(self._changes.shape)

    def counts(self) -> Floats:
        """One line of slices for each group."""
        covering: Floats = np.maximum(np.cumsum(self._changes, axis=1)[:, :PLOT_SLICES], 0.0)
        return covering
