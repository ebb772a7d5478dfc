"""Sums over a job's rows, and when they began and ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.tables import results
from promptmill.reports.figures.columns import Floats, Series, Tokens, Truths

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
    """Of some rows; ``ok``: which of them have an answer."""
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


def began_and_ended(db: Connection, job_id: str) -> tuple[float, float] | None:
    """First admission and last end of the rows that had a slot, in seconds since the epoch; None: there are none."""
    return span_of(db.execute(span_query(job_id)).one())


def span_of(found: Sequence[Any]) -> tuple[float, float] | None:
    """What a :func:`span_query` found."""
    begin, end = found
    return None if begin is None else (float(begin), float(end))


def span_query(job_id: str) -> sa.Select[Any]:
    """First admission and last end."""
    each = results.c
    return sa.select(sa.func.min(each.admitted_at), sa.func.max(each.finished_at)).where(
        each.job_id == job_id, each.admitted_at.is_not(None), each.finished_at.is_not(None)
    )
