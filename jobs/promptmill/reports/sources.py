"""Where the rows of a report come from: one connection that sees one moment, or several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill import parallel
from promptmill.database import reading
from promptmill.reports.scan import Floats, Places, blocks
from promptmill.reports.totals import Span, Totals, began_and_ended, totals
from promptmill.tables import jobs


class Source(Protocol):
    """All rows of one job."""

    def began_and_ended(self) -> tuple[float, float] | None: ...

    def blocks(self, places: Places, prefill: bool) -> Iterator[Floats]: ...

    def totals(self) -> Totals:
        """To be asked after the last of the blocks."""


class Here:
    """Rows of one connection, one after the other."""

    def __init__(self, db: Connection, job_id: str) -> None:
        self._db, self._job_id = db, job_id

    def began_and_ended(self) -> tuple[float, float] | None:
        return began_and_ended(self._db, self._job_id)

    def blocks(self, places: Places, prefill: bool) -> Iterator[Floats]:
        return blocks(self._db, self._job_id, places, prefill)

    def totals(self) -> Totals:
        return totals(self._db, self._job_id)


class Shared:
    """Rows shared out among processes."""

    def __init__(self, readers: parallel.Readers, job: sa.Row[Any]) -> None:
        self._readers, self._job = readers, job
        self._totals = Totals()

    def began_and_ended(self) -> tuple[float, float] | None:
        found = [each for each in self._each(_span_of) if each is not None]
        return (min(begin for begin, _ in found), max(end for _, end in found)) if found else None

    def blocks(self, places: Places, prefill: bool) -> Iterator[Floats]:
        self._totals = Totals()
        for rows, sums in self._each(_read, places, prefill):
            self._totals += sums
            if len(rows):
                yield rows

    def totals(self) -> Totals:
        return self._totals

    def _each(self, work: Any, *arguments: Any) -> Iterator[Any]:
        return self._readers.each(work, parallel.ranges(self._job.rows), self._job.id, *arguments)


def _span_of(db: Connection, span: Span, job_id: str) -> tuple[float, float] | None:
    return began_and_ended(db, job_id, span)


def _read(db: Connection, span: Span, job_id: str, places: Places, prefill: bool) -> tuple[Floats, Totals]:
    found = list(blocks(db, job_id, places, prefill, span))
    return np.concatenate(found) if found else np.empty((0, 0)), totals(db, job_id, span)


@contextmanager
def shared(db: Connection, job: sa.Row[Any]) -> Iterator[Shared]:
    """The job's rows by several processes."""
    with parallel.readers(db.engine) as readers:
        yield Shared(readers, job)


def is_as_it_was(db: Connection, job: sa.Row[Any]) -> bool:
    """Whether the job is now what it was when ``job`` was read: nobody has retried or removed it."""
    query = sa.select(jobs.c.state, jobs.c.finished_at).where(jobs.c.id == job.id)
    with reading(db.engine) as now:
        return now.execute(query).one_or_none() == (job.state, job.finished_at)
