"""What a report reads: a job's rows, its attempts, and its workers.

Sums are made by the database; what needs single rows is folded in one streaming pass (``fold``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.database import reading
from promptmill.errors import UnknownName
from promptmill.reports.fold import Folded, Group, fold
from promptmill.tables import attempts, job_tags, jobs, results, worker_samples, workers

#: Seconds by which two clocks may disagree before a row counts as out of order: SQLite's clock ticks in milliseconds,
#: and clocks of different machines are set by Redis to a few more.
CLOCK_TOLERANCE_S = 0.010

#: Seconds around a job in which a sample of its workers counts: they are taken every 5 s, at a start and at an end.
SAMPLED_S = 6.0


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a job's rows. Tokens are of answers, without those copied from an identical request."""

    prompt_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    #: Answers that were copied from an identical request: they are in no sum of tokens.
    copied: int
    over_max_tokens: int
    over_cached: int
    #: Rows whose stamps of one worker are out of order.
    disordered: int
    #: Rows admitted before they were enqueued, by more than clocks may disagree.
    early: int


@dataclass(frozen=True, slots=True)
class ErrorExample:
    """The first row that failed in one way."""

    error_class: str
    row: int
    message: str

    def to_json(self) -> dict[str, str | int]:
        return {"class": self.error_class, "row": self.row, "message": self.message}


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was read, of one moment."""

    job: sa.Row[Any]
    folded: Folded
    totals: Totals
    examples: tuple[ErrorExample, ...]
    tags: tuple[str, ...]
    attempts: tuple[sa.Row[Any], ...]
    #: Attempts of other jobs on the same workers at the same time.
    shared: int
    workers: tuple[sa.Row[Any], ...]
    #: Worker -> most memory and most device memory, in bytes, of its samples while the job ran.
    memory: Mapping[str, tuple[int | None, int | None]]


@contextmanager
def consistent(db: Engine | Connection) -> Iterator[Connection]:
    """A connection that sees one state of the database."""
    if isinstance(db, Connection):
        yield db
    else:
        with reading(db) as connection:
            yield connection


def read_facts(db: Connection, job_id: str, detailed: bool = False) -> Facts:
    """All that a report needs but the answers; ``detailed``: what plots need, too.

    Raises :class:`UnknownName` when there is no such job.
    """
    job = db.execute(sa.select(jobs).where(jobs.c.id == job_id)).one_or_none()
    if job is None:
        raise UnknownName(f"there is no job {job_id}", hint="'promptmill list' shows the jobs.")
    folded = fold(db, job_id, job.rows, detailed)
    groups = folded.groups
    tried = tuple(db.execute(sa.select(attempts).where(attempts.c.job_id == job_id)).all())
    own_tags = sa.select(job_tags.c.tag).where(job_tags.c.job_id == job_id).order_by(job_tags.c.tag)
    ids = sorted({each.worker_id for each in tried} | {each.worker_id for each in groups if each.worker_id})
    return Facts(
        job=job,
        folded=folded,
        totals=_totals(db, job_id),
        examples=_examples(db, job_id) if any(each.state == "error" for each in groups) else (),
        tags=tuple(db.execute(own_tags).scalars()),
        attempts=tried,
        shared=_shared(db, job_id, tried),
        workers=tuple(db.execute(sa.select(workers).where(workers.c.id.in_(ids)).order_by(workers.c.id)).all()),
        memory=_memory(db, ids, groups),
    )


def _totals(db: Connection, job_id: str) -> Totals:
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
    ).where(each.job_id == job_id)
    counts: tuple[int, ...] = tuple(db.execute(query).one())
    return Totals(*counts)


def _examples(db: Connection, job_id: str) -> tuple[ErrorExample, ...]:
    """For each error class the row that comes first in the dataset."""
    each = results.c
    first = (
        sa.select(sa.func.min(each.row))
        .where(each.job_id == job_id, each.state == "error")
        .group_by(each.error_class)
        .scalar_subquery()
    )
    query = (
        sa.select(each.error_class, each.row, each.error_message)
        .where(each.job_id == job_id, each.row.in_(first))
        .order_by(each.error_class)
    )
    return tuple(ErrorExample(name or "internal", row, message or "") for name, row, message in db.execute(query))


def _shared(db: Connection, job_id: str, tried: tuple[sa.Row[Any], ...]) -> int:
    if not tried:
        return 0
    each = attempts.c
    begin = min(attempt.started_at for attempt in tried)
    end = max(attempt.ended_at or attempt.started_at for attempt in tried)
    query = sa.select(sa.func.count()).where(
        each.worker_id.in_({attempt.worker_id for attempt in tried}),
        each.job_id != job_id,
        each.started_at < end,
        sa.func.coalesce(each.ended_at, end) > begin,
    )
    return int(db.execute(query).scalar_one())


def _memory(db: Connection, ids: list[str], groups: tuple[Group, ...]) -> dict[str, tuple[int | None, int | None]]:
    begins = [group.first_admitted_at for group in groups if group.first_admitted_at is not None]
    ends = [group.last_finished_at for group in groups if group.last_finished_at is not None]
    if not begins or not ends:
        return {}
    each = worker_samples.c
    query = (
        sa.select(each.worker_id, sa.func.max(each.memory_bytes), sa.func.max(each.device_memory_bytes))
        .where(each.worker_id.in_(ids), each.at.between(min(begins) - SAMPLED_S, max(ends) + SAMPLED_S))
        .group_by(each.worker_id)
    )
    return {worker: (memory, device) for worker, memory, device in db.execute(query)}
