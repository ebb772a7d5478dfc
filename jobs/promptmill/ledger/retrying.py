"""Running the errors of an ended job again, by hand."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.counting import counting
from promptmill.database.engine import copy_rows, writing
from promptmill.database.tables import chunks, jobs, requests, results, retries
from promptmill.errors import JobError
from promptmill.ledger.base import is_chunk, model_of
from promptmill.ledger.leases import Leases
from promptmill.ledger.results import RETRY_COLUMNS
from promptmill.ledger.values import RETRY_CHUNK_ROWS
from promptmill.types import ChunkId, ErrorClass, JobState

#: Rows named in one statement.
STATEMENT_ROWS = 500


class Retrying(Leases):
    """Errors move from ``results`` to ``retries``, and their rows to new chunks."""

    def retry(self, job_id: str, error_class: ErrorClass | None = None) -> int:
        """Run the rows of an ended job again that ended as an error (of ``error_class``); returns how many.

        Their time limit starts with them. Raises :class:`JobError` for a job that has not ended, was cancelled, lost
        its prompts, or is past its deadline.
        """
        with writing(self.db) as db:
            # Chunks before their job, as everybody locks them: two who do it the other way round wait for each other.
            every = sa.select(chunks.c.number).where(chunks.c.job_id == job_id).order_by(chunks.c.number)
            db.execute(every.with_for_update())
            self._require_retryable(db, job_id)
            failed = self._failed_rows(db, job_id, error_class)
            if failed:
                self._move_to_retries(db, job_id, failed)
                rows = [each.row for each in failed]
                self._add_chunks(db, job_id, rows, most=RETRY_CHUNK_ROWS, failures=0, not_before=None)
                self._reopen(db, job_id, limit_from=None)
        return len(failed)

    def _require_retryable(self, db: Connection, job_id: str) -> None:
        job = sa.select(jobs.c.state).where(jobs.c.id == job_id)
        state = JobState(db.execute(job.with_for_update(key_share=True)).scalar_one())
        if not state.is_final:
            raise JobError(
                f"job {job_id} is {state.value}: its errors can be retried once it has ended",
                hint=f"Follow it with: promptmill watch {job_id}",
            )
        if state in (JobState.CANCELLED, JobState.EXPIRED):
            raise JobError(f"job {job_id} is {state.value}: nothing of it is run again", hint="Submit it anew.")
        self._refuse_rerun(db, job_id)

    def _failed_rows(self, db: Connection, job_id: str, error_class: ErrorClass | None) -> list[sa.Row[Any]]:
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

    def _move_to_retries(self, db: Connection, job_id: str, failed: Sequence[sa.Row[Any]]) -> None:
        now = db.execute(sa.select(self._now())).scalar_one()
        owners = self._owners(db, job_id, [each.row for each in failed])
        place = RETRY_COLUMNS.index("chunk")
        moved = [
            (*each[:place], owner, *each[place + 1 :], now, True) for each, owner in zip(failed, owners, strict=True)
        ]
        copy_rows(db, retries, (*RETRY_COLUMNS, "retried_at", "by_hand"), moved)
        counting(db, model_of(db, job_id)).add("retries", len(moved))
        for first in range(0, len(failed), STATEMENT_ROWS):
            rows = [each.row for each in failed[first : first + STATEMENT_ROWS]]
            db.execute(sa.delete(results).where(results.c.job_id == job_id, results.c.row.in_(rows)))
        for number, count in Counter(owners).items():
            db.execute(
                sa.update(chunks)
                .where(is_chunk(ChunkId(job_id, number)))
                .values(errors=chunks.c.errors - count, moved=chunks.c.moved + count)
            )

    def _owners(self, db: Connection, job_id: str, rows: Sequence[int]) -> list[int]:
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
