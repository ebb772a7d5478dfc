"""Conditions on rows that several changes share."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.engine import epoch
from promptmill.database.tables import FAILED, attempts, chunks
from promptmill.types import ChunkId, ChunkState, Lease


def is_chunk(chunk: ChunkId) -> sa.ColumnElement[bool]:
    return sa.and_(chunks.c.job_id == chunk.job_id, chunks.c.number == chunk.number)


def held_by(lease: Lease) -> sa.ColumnElement[bool]:
    """The attempt number is the fencing token: a worker that was overtaken changes nothing."""
    return sa.and_(is_chunk(lease.chunk), chunks.c.state == ChunkState.LEASED.value, chunks.c.attempt == lease.attempt)


def is_attempt(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(
        attempts.c.job_id == lease.chunk.job_id,
        attempts.c.number == lease.chunk.number,
        attempts.c.attempt == lease.attempt,
    )


def in_range(column: sa.Column[Any], lease: Lease) -> sa.ColumnElement[bool]:
    return column.between(lease.first_row, lease.first_row + lease.rows - 1)


def claimable() -> sa.ColumnElement[bool]:
    """A chunk whose lease ran out is not: its failure is counted first."""
    may_begin = sa.or_(chunks.c.not_before.is_(None), chunks.c.not_before <= epoch())
    return sa.and_(chunks.c.state == ChunkState.QUEUED.value, may_begin)


def in_turn(job_id: str) -> tuple[sa.Select[int], sa.Select[int]]:
    """The numbers of chunks that may be run now: those that failed before, and then the others.

    A request that ends its host is searched for to its end, in ever smaller pieces, before other chunks are begun:
    else each of these might lose a host too, and no row would ever be answered.
    """
    waiting = sa.select(chunks.c.number).where(chunks.c.job_id == job_id, claimable())
    return (
        waiting.where(FAILED).order_by(chunks.c.rows, chunks.c.number),
        waiting.where(chunks.c.failures == 0).order_by(chunks.c.number),
    )


def lock_held(db: Connection, lease: Lease) -> bool:
    """Lock the leased chunk for this transaction; False when the lease was overtaken."""
    return db.execute(sa.select(chunks.c.number).where(held_by(lease)).with_for_update()).scalar() is not None


def change_locked(db: Connection, chunk: ChunkId, **values: Any) -> None:
    """Change a chunk that this transaction has locked."""
    changed = db.execute(sa.update(chunks).where(is_chunk(chunk)).values(values))
    assert changed.rowcount == 1, f"chunk {chunk} is gone, although it is locked"
