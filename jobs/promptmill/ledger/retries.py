"""Errors that are run again: they move from ``results`` to ``retries``, and their rows to new chunks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.clock import DatabaseClock
from promptmill.database.counting import counting
from promptmill.database.engine import copy_rows, epoch, now_of
from promptmill.database.tables import chunks, requests, results, retries
from promptmill.errors import JobError
from promptmill.ledger.conditions import change_locked
from promptmill.ledger.jobs import lock_job, refuse_rerun, reopen
from promptmill.ledger.status import model_name
from promptmill.ledger.values import RETRY_CHUNK_ROWS, RETRYABLE, Terms, back_off_s, storable
from promptmill.types import ChunkId, ChunkState, ErrorClass, Failed, JobState, Lease, Result

#: Columns of ``retries`` that a result fills; ``retried_at`` follows.
RETRY_COLUMNS = (
    "job_id", "row", "chunk", "attempt", "worker_id", "error_class", "error_message", "prompt_tokens", "output_tokens",
    "admitted_at", "finished_at",
)  # fmt: skip

#: Rows named in one statement.
STATEMENT_ROWS = 500

# --- by themselves ---------------------------------------------------------------------------------------------------


def worth_retrying(db: Connection, terms: Terms, lease: Lease, batch: Sequence[Result]) -> dict[int, int]:
    """Rows of the batch that failed in a way that may go better, and how often each was tried before."""
    failed = [each.row for each in batch if isinstance(each, Failed) and each.error_class in RETRYABLE]
    if not failed:
        return {}
    # A retry by hand begins anew.
    again = retries.alias()
    begun = (
        sa.select(sa.func.max(again.c.retried_at))
        .where(again.c.job_id == retries.c.job_id, again.c.row == retries.c.row, again.c.by_hand)
        .scalar_subquery()
    )
    query = (
        sa.select(retries.c.row, sa.func.count())
        .where(retries.c.job_id == lease.chunk.job_id, retries.c.row.in_(failed), ~retries.c.by_hand)
        .where(retries.c.retried_at > sa.func.coalesce(begun, 0.0))
        .group_by(retries.c.row)
    )
    before: dict[int, int] = {each.row: each[1] for each in db.execute(query)}
    return {row: before.get(row, 0) for row in failed if before.get(row, 0) + 1 < terms.max_attempts}


def retry_later(
    db: Connection, lease: Lease, batch: Sequence[Result], tried: dict[int, int], now: float, clock: DatabaseClock
) -> None:
    """Keep the errors in ``retries`` and give their rows to new chunks, to be run after a wait."""
    columns = (*RETRY_COLUMNS, "retried_at", "by_hand")
    copy_rows(db, retries, columns, [(*_retry_row(lease, each, clock), now, False) for each in batch])
    lock_job(db, lease.chunk.job_id)
    for failures in sorted({tried[each.row] + 1 for each in batch}):
        rows = sorted(each.row for each in batch if tried[each.row] + 1 == failures)
        _add_chunks(db, lease.chunk.job_id, rows, most=len(rows), not_before=epoch() + back_off_s(failures))


def _retry_row(lease: Lease, result: Result, clock: DatabaseClock) -> tuple[Any, ...]:
    """A row of ``retries`` in the order of RETRY_COLUMNS."""
    assert isinstance(result, Failed)
    usage, timing = result.usage, result.timing.by(clock.at) if result.timing else None
    return (
        lease.chunk.job_id, result.row, lease.chunk.number, lease.attempt, lease.worker_id, result.error_class.value,
        storable(result.message), usage.prompt_tokens if usage else None, usage.output_tokens if usage else None,
        timing.admitted_at if timing else None, timing.finished_at if timing else None,
    )  # fmt: skip


# --- by hand ---------------------------------------------------------------------------------------------------------


def retry(db: Connection, job_id: str, error_class: ErrorClass | None = None) -> int:
    """Run the rows of an ended job again that ended as an error (of ``error_class``); returns how many.

    Their time limit starts with them. Raises :class:`JobError` for a job that has not ended, was cancelled, lost
    its prompts, or is past its deadline.
    """
    # Chunks before their job, as all changes lock them: two that do it the other way round wait for each other.
    every = sa.select(chunks.c.number).where(chunks.c.job_id == job_id).order_by(chunks.c.number)
    db.execute(every.with_for_update())
    _require_retryable(db, job_id)
    failed = _failed_rows(db, job_id, error_class)
    if failed:
        _move_to_retries(db, job_id, failed)
        _add_chunks(db, job_id, [each.row for each in failed], most=RETRY_CHUNK_ROWS, not_before=None)
        reopen(db, job_id, limit_from=None)
    return len(failed)


def _require_retryable(db: Connection, job_id: str) -> None:
    state = lock_job(db, job_id)
    if not state.is_final:
        raise JobError(
            f"job {job_id} is {state.value}: its errors can be retried once it has ended",
            hint=f"Follow it with: promptmill watch {job_id}",
        )
    if state in (JobState.CANCELLED, JobState.EXPIRED):
        raise JobError(f"job {job_id} is {state.value}: nothing of it is run again", hint="Submit it anew.")
    refuse_rerun(db, job_id)


def _failed_rows(db: Connection, job_id: str, error_class: ErrorClass | None) -> list[sa.Row[Any]]:
    """Errors of rows that could be read, in order of the rows."""
    is_class = sa.true() if error_class is None else results.c.error_class == error_class.value
    query = (
        sa.select(*(results.c[name] for name in RETRY_COLUMNS))
        .join(requests, sa.and_(requests.c.job_id == results.c.job_id, requests.c.row == results.c.row))
        .where(results.c.job_id == job_id, results.c.state == "error", is_class)
        # A line that could not be read at submission stays unreadable, and belongs to no attempt.
        .where(requests.c.input.is_not(None), results.c.chunk.is_not(None))
        .order_by(results.c.row)
    )
    return list(db.execute(query))


def _move_to_retries(db: Connection, job_id: str, failed: Sequence[sa.Row[Any]]) -> None:
    now = now_of(db)
    owners = _owners(db, job_id, [each.row for each in failed])
    place = RETRY_COLUMNS.index("chunk")
    moved = [(*each[:place], owner, *each[place + 1 :], now, True) for each, owner in zip(failed, owners, strict=True)]
    copy_rows(db, retries, (*RETRY_COLUMNS, "retried_at", "by_hand"), moved)
    counting(db, model_name(db, job_id)).add("retries", len(moved))
    for first in range(0, len(failed), STATEMENT_ROWS):
        rows = [each.row for each in failed[first : first + STATEMENT_ROWS]]
        gone = db.execute(sa.delete(results).where(results.c.job_id == job_id, results.c.row.in_(rows)))
        assert gone.rowcount == len(rows), f"job {job_id}: results changed, although its chunks are locked"
    for number, count in Counter(owners).items():
        change_locked(
            db, ChunkId(job_id, number), errors=chunks.c.errors - count, moved=chunks.c.moved + count
        )  # fmt: skip


def _owners(db: Connection, job_id: str, rows: Sequence[int]) -> list[int]:
    """The chunk that each of the ascending ``rows`` counts in: the youngest that spans it and did not give it away.

    Splits and earlier retries may have made it another one than that whose attempt answered the row. The pieces of
    a split are younger than the chunk that a row was given to before.
    """
    gave = sa.select(retries.c.row, retries.c.chunk).where(retries.c.job_id == job_id)
    given = {(row, number) for row, number in db.execute(gave)}
    spans = sa.select(chunks.c.number, chunks.c.first_row, chunks.c.rows).where(chunks.c.job_id == job_id)
    owners = [0] * len(rows)
    for number, first_row, size in db.execute(spans.where(chunks.c.rows > 0).order_by(chunks.c.number)):
        for place in range(bisect_left(rows, first_row), bisect_left(rows, first_row + size)):
            if (rows[place], number) not in given:
                owners[place] = number
    return owners


# --- new chunks ------------------------------------------------------------------------------------------------------


def _add_chunks(db: Connection, job_id: str, rows: Sequence[int], most: int, not_before: Any) -> None:
    """New chunks for rows that have lost theirs: runs of consecutive ones. The caller holds the job's lock."""
    last = db.execute(sa.select(sa.func.max(chunks.c.number)).where(chunks.c.job_id == job_id)).scalar_one()
    for number, run in enumerate(_runs(rows, most), start=last + 1):
        db.execute(
            sa.insert(chunks).values(
                job_id=job_id, number=number, first_row=run.start, rows=len(run), state=ChunkState.QUEUED.value,
                attempt=0, failures=0, not_before=not_before, ok=0, errors=0, moved=0, output_tokens=0,
            )
        )  # fmt: skip


def _runs(rows: Sequence[int], most: int) -> Iterator[range]:
    """Ascending rows as runs of consecutive ones, each of at most ``most``."""
    first = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1 or place - first == most:
            yield range(rows[first], rows[place - 1] + 1)
            first = place
