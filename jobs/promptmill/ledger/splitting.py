"""Chunks whose attempt failed: put back, split after several failures, or given up when one row is left."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.counting import counting
from promptmill.database.engine import epoch
from promptmill.database.tables import chunks, jobs, results, retries
from promptmill.ledger.conditions import change_locked, is_chunk
from promptmill.ledger.jobs import judge_guard, lock_job
from promptmill.ledger.status import model_name
from promptmill.ledger.values import LOST_WORKERS, SPLIT_PIECES, Terms, back_off_s
from promptmill.types import ChunkId, ChunkState, ErrorClass, Failed, JobState


def requeue(db: Connection, terms: Terms, chunk: ChunkId, error_class: ErrorClass, message: str) -> None:
    """Put a chunk whose attempt failed back, whole or in pieces. The caller holds its row."""
    row = db.execute(sa.select(chunks).where(is_chunk(chunk))).one()
    failures = row.failures + 1
    # Workers are stopped for many reasons; a lost one proves less than a host that died under one request.
    last = terms.max_attempts + (LOST_WORKERS if error_class is ErrorClass.WORKER_LOST and row.rows == 1 else 0)
    job_state = JobState(db.execute(sa.select(jobs.c.state).where(jobs.c.id == chunk.job_id)).scalar_one())
    if row.ok + row.errors + row.moved == row.rows:
        change_locked(db, chunk, state=ChunkState.DONE.value, leased_until=None)
    elif job_state.is_final:
        _put_back(db, chunk, failures, message)
    elif failures < last:
        # At once the first time: most often it was nothing of the chunk's doing.
        _put_back(db, chunk, failures, message, wait_s=0.0 if failures == 1 else back_off_s(failures - 1))
    elif row.rows > 1:
        _put_back(db, chunk, failures, message)
        _split(db, terms, chunk)
    else:
        _give_up(db, chunk, row.first_row, row.attempt, error_class, message)


def _put_back(db: Connection, chunk: ChunkId, failures: int, message: str, wait_s: float = 0.0) -> None:
    change_locked(
        db, chunk, state=ChunkState.QUEUED.value, leased_until=None, worker_id=None, published_at=None,
        not_before=epoch() + wait_s if wait_s else None, last_error=message, failures=failures,
    )  # fmt: skip


def _split(db: Connection, terms: Terms, chunk: ChunkId) -> None:
    """Replace a chunk by pieces, so that one poisonous request parts from its neighbours.

    A piece has one attempt left before it is split in turn: the search for the bad request costs few crashes.
    The chunk itself stays with no rows, for its attempts to refer to; its fencing number is never used again.
    """
    # Two chunks of one job split at once would choose the same numbers.
    lock_job(db, chunk.job_id)
    parent = db.execute(sa.select(chunks).where(is_chunk(chunk))).one()
    last = db.execute(sa.select(sa.func.max(chunks.c.number)).where(chunks.c.job_id == chunk.job_id)).scalar_one()
    for number, span in enumerate(_pieces(parent.first_row, parent.rows), start=last + 1):
        # Rows that the parent handed to another chunk are the piece's to leave alone now.
        moved = db.execute(
            sa.update(retries)
            .where(retries.c.job_id == chunk.job_id, retries.c.chunk == chunk.number)
            .where(retries.c.row.between(span.start, span.stop - 1))
            .values(chunk=number)
        ).rowcount
        ok, errors, tokens = _counts_between(db, ChunkId(chunk.job_id, number), span)
        state = ChunkState.DONE if ok + errors + moved == len(span) else ChunkState.QUEUED
        db.execute(
            sa.insert(chunks).values(
                job_id=chunk.job_id, number=number, first_row=span.start, rows=len(span), state=state.value,
                attempt=0, failures=terms.max_attempts - 1, ok=ok, errors=errors, moved=moved, output_tokens=tokens,
                last_error=parent.last_error,
            )
        )  # fmt: skip
    change_locked(db, chunk, state=ChunkState.DONE.value, rows=0, ok=0, errors=0, moved=0, output_tokens=0)


def _pieces(first_row: int, rows: int) -> list[range]:
    """A chunk's rows in SPLIT_PIECES runs, or one each."""
    size = max(1, -(-rows // SPLIT_PIECES))
    end = first_row + rows
    return [range(start, min(start + size, end)) for start in range(first_row, end, size)]


def _counts_between(db: Connection, piece: ChunkId, span: range) -> tuple[int, int, int]:
    """Answers, errors and generated tokens stored for the rows of a piece, without those that it gave away."""
    is_ok = results.c.state == "ok"
    generated = sa.and_(is_ok, ~results.c.deduplicated)
    given = sa.select(retries.c.row).where(retries.c.job_id == piece.job_id, retries.c.chunk == piece.number)
    ok, total, tokens = db.execute(
        sa.select(
            sa.func.sum(sa.case((is_ok, 1), else_=0)),
            sa.func.count(),
            sa.func.sum(sa.case((generated, results.c.output_tokens), else_=0)),
        )
        .where(results.c.job_id == piece.job_id, results.c.row.between(span.start, span.stop - 1))
        .where(results.c.row.not_in(given))
    ).one()
    return int(ok or 0), int(total) - int(ok or 0), int(tokens or 0)


def _give_up(db: Connection, chunk: ChunkId, row: int, attempt: int, error_class: ErrorClass, message: str) -> None:
    """One request, alone, failed for the last time: it ends as an error."""
    db.execute(
        sa.insert(results).values(
            job_id=chunk.job_id, row=row, state="error", error_class=error_class.value, error_message=message,
            committed_at=epoch(), attempt=attempt, chunk=chunk.number,
        )
    )  # fmt: skip
    counting(db, model_name(db, chunk.job_id)).results([Failed(row, error_class, message)], enqueued_at=None)
    change_locked(
        db, chunk, state=ChunkState.DONE.value, leased_until=None, errors=chunks.c.errors + 1, last_error=message
    )
    judge_guard(db, chunk.job_id)
