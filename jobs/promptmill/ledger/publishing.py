"""Messages: which chunks get one, and which have lost theirs."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.engine import epoch
from promptmill.database.tables import chunks
from promptmill.ledger.conditions import claimable, in_turn, is_chunk
from promptmill.ledger.status import is_open
from promptmill.types import ChunkId, ChunkState


def take_window(db: Connection, job_id: str, size: int) -> list[ChunkId]:
    """Mark the next chunks as published so that at most ``size`` are under way; the caller sends their messages.

    A message that is lost between this mark and the broker is published again by the reconciler.
    """
    if not is_open(db, job_id):
        return []
    under_way = db.execute(
        sa.select(sa.func.count())
        .select_from(chunks)
        .where(chunks.c.job_id == job_id, chunks.c.state != ChunkState.DONE.value)
        .where(chunks.c.published_at.is_not(None))
    ).scalar_one()
    numbers: list[int] = []
    for waiting in in_turn(job_id):
        room = size - under_way - len(numbers)
        if room > 0:
            ready = waiting.where(chunks.c.published_at.is_(None)).limit(room).with_for_update(skip_locked=True)
            numbers += db.execute(ready).scalars()
    if numbers:
        marked = db.execute(
            sa.update(chunks)
            .where(chunks.c.job_id == job_id, chunks.c.number.in_(numbers))
            .values(published_at=epoch())
        )
        assert marked.rowcount == len(numbers), f"job {job_id}: chunks are gone, although they are locked"
    return [ChunkId(job_id, number) for number in numbers]


def mark_published(db: Connection, lost: Sequence[ChunkId]) -> list[ChunkId]:
    """Mark queued chunks as published beyond the window of their job; returns those that may be run now."""
    marked = []
    for chunk in lost:
        changed = db.execute(
            sa.update(chunks)
            .where(is_chunk(chunk), claimable(), chunks.c.published_at.is_(None))
            .values(published_at=epoch())
        )
        if changed.rowcount == 1:
            marked.append(chunk)
    return marked


def unpublish_chunk(db: Connection, chunk: ChunkId) -> None:
    """Forget the message of a queued chunk: a worker that read it does not run it."""
    db.execute(
        sa.update(chunks).where(is_chunk(chunk), chunks.c.state == ChunkState.QUEUED.value).values(published_at=None)
    )


def unpublish(db: Connection, job_id: str, older_than_s: float) -> int:
    """Forget the messages of queued chunks published longer ago than ``older_than_s``: they were lost."""
    changed = db.execute(
        sa.update(chunks)
        .where(chunks.c.job_id == job_id, chunks.c.state == ChunkState.QUEUED.value)
        .where(chunks.c.published_at < epoch() - older_than_s)
        .values(published_at=None)
    )
    return changed.rowcount
