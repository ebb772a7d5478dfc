"""Sums over a job's rows that a database makes."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.tables import results

#: Seconds by which two clocks may disagree before a row counts as out of order: SQLite's clock ticks in milliseconds,
#: and clocks of different machines are set by Redis to a few more.
CLOCK_TOLERANCE_S = 0.010

#: The first row, and the first one after the last.
Span = tuple[int, int]


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


def totals(db: Connection, job_id: str, rows: Span | None = None) -> Totals:
    """Of the job's results; ``rows``: of these only."""
    each = results.c
    computed = sa.and_(each.state == "ok", ~each.deduplicated)
    disordered = sa.or_(each.first_token_at < each.admitted_at, each.finished_at < each.first_token_at)
    query = sa.select(
        # PostgreSQL sums integers to bigint; of nothing, both databases sum to NULL.
        *(
            sa.func.coalesce(sa.func.sum(column).filter(computed), 0)
            for column in (each.prompt_tokens, each.cached_tokens, each.reasoning_tokens)
        ),
        sa.func.count().filter(sa.and_(each.state == "ok", each.deduplicated)),
        sa.func.count().filter(each.output_tokens > each.max_tokens),
        sa.func.count().filter(each.cached_tokens > each.prompt_tokens),
        sa.func.count().filter(disordered),
        sa.func.count().filter(each.enqueued_at > each.admitted_at + CLOCK_TOLERANCE_S),
    ).where(each.job_id == job_id, *among(rows))
    return Totals(*(int(count) for count in db.execute(query).one()))


def began_and_ended(db: Connection, job_id: str, rows: Span | None = None) -> tuple[float, float] | None:
    """First admission and last end of the rows that had a slot, in seconds since the epoch; None: there are none."""
    each = results.c
    query = sa.select(sa.func.min(each.admitted_at), sa.func.max(each.finished_at)).where(
        each.job_id == job_id, each.admitted_at.is_not(None), each.finished_at.is_not(None), *among(rows)
    )
    begin, end = db.execute(query).one()
    return None if begin is None else (float(begin), float(end))


def among(rows: Span | None) -> tuple[sa.ColumnElement[bool], ...]:
    """The condition that a result is of these rows."""
    return () if rows is None else (results.c.row >= rows[0], results.c.row < rows[1])
