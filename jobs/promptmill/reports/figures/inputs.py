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

from promptmill.database.engine import reading
from promptmill.database.figure_sql import SAMPLED_S
from promptmill.database.tables import attempts, job_tags, jobs, results, worker_samples, workers
from promptmill.errors import UnknownName
from promptmill.reports.figures.aggregate import Folded, Group, Totals, fold


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
    folded = fold(db, job, detailed)
    groups = folded.groups
    tried = tuple(db.execute(sa.select(attempts).where(attempts.c.job_id == job_id)).all())
    own_tags = sa.select(job_tags.c.tag).where(job_tags.c.job_id == job_id).order_by(job_tags.c.tag)
    ids = sorted({each.worker_id for each in tried} | {each.worker_id for each in groups if each.worker_id})
    return Facts(
        job=job,
        folded=folded,
        totals=folded.totals,
        examples=_examples(db, job_id) if any(each.state == "error" for each in groups) else (),
        tags=tuple(db.execute(own_tags).scalars()),
        attempts=tried,
        shared=_shared(db, job_id, tried),
        workers=tuple(db.execute(sa.select(workers).where(workers.c.id.in_(ids)).order_by(workers.c.id)).all()),
        memory=_memory(db, ids, groups),
    )


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
