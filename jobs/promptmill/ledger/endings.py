"""The end of an attempt: done, given back, or failed; a chunk that fails again and again is split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.counting import counting
from promptmill.database.engine import reading, writing
from promptmill.database.tables import attempts, chunks, jobs, results, retries
from promptmill.ledger.base import counts_between, held_by, is_chunk, log, model_of, storable
from promptmill.ledger.results import Results, generated, is_attempt
from promptmill.ledger.values import LOST_WORKERS, SPLIT_PIECES
from promptmill.types import ChunkId, ChunkState, EngineCounters, ErrorClass, Failed, JobState, Lease, Ok, Result


class Endings(Results):
    """Every attempt ends in one of these ways, or is found lost."""

    def finish(
        self,
        lease: Lease,
        counters: EngineCounters | None = None,
        slots: int | None = None,
        last: Sequence[tuple[Result, int]] = (),
        *,
        maybe_stored: bool = False,
        closed_at: float | None = None,
    ) -> bool:
        """Record the ``last`` results and close the chunk, and its job when it was the last chunk: one transaction.

        ``closed_at``: when ``counters`` were taken, by ``time.monotonic()``: the attempt ends there, for many workers
        may wait for each other's locks, and begins when its worker knew of it, for a claim may take long to be
        committed. The engine's counters are of this time. None: it ends now.

        False when the lease was overtaken, or rows of the chunk have no result; results that count are kept.
        """
        with writing(self.db) as db:
            span = None
            if closed_at is not None:
                _, clock = self.read_clock(db)
                span = clock.at(lease.taken_at), clock.at(closed_at)
            if maybe_stored and last:
                last = self._unstored(db, lease, last)
            self._record(db, lease, last)
            changed = db.execute(
                sa.update(chunks)
                .where(held_by(lease), chunks.c.ok + chunks.c.errors + chunks.c.moved == chunks.c.rows)
                .values(state=ChunkState.DONE.value, leased_until=None)
            )
            if changed.rowcount != 1:
                if not last:
                    self._tell_overtaken(db, lease, "ended")
                return False
            self._end_attempt(db, lease, "done", counters, slots, span)
            self._complete_if_done(db, lease.chunk.job_id)
        return True

    def has_ended(self, lease: Lease) -> bool:
        """Whether its worker has closed the attempt: for one that was not told that its commit went through."""
        outcome = sa.select(attempts.c.outcome).where(is_attempt(lease))
        with reading(self.db) as db:
            return db.execute(outcome).scalar() in ("done", "released")

    def release(
        self,
        lease: Lease,
        counters: EngineCounters | None = None,
        slots: int | None = None,
        refused: Sequence[tuple[Result, int]] = (),
    ) -> bool:
        """Give the chunk back: this worker stops, or the work is not wanted. It does not count as a failed attempt.

        ``refused``: answers that may not have been taken, because the job had ended. The tokens of those that were not
        are wasted.
        """
        with writing(self.db) as db:
            if counters is not None and refused:
                lost = sum(generated(each) for each, _ in self._unstored(db, lease, refused) if isinstance(each, Ok))
                counters = counters.plus(EngineCounters(wasted_tokens=lost))
            changed = db.execute(
                sa.update(chunks)
                .where(held_by(lease))
                .values(state=ChunkState.QUEUED.value, leased_until=None, worker_id=None, published_at=None)
            )
            self._end_attempt(db, lease, "released", counters, slots)
            if changed.rowcount != 1:
                self._tell_overtaken(db, lease, "was given back")
        return changed.rowcount == 1

    def fail(self, lease: Lease, error_class: ErrorClass, message: str) -> bool:
        """The attempt failed as a whole (its host died): try again later, or split the chunk, or give the row up."""
        with writing(self.db) as db:
            if db.execute(sa.select(chunks.c.number).where(held_by(lease)).with_for_update()).scalar() is None:
                log.warning(
                    "chunk %s/%d: attempt %d of %s failed after its lease was lost",
                    lease.chunk.job_id, lease.chunk.number, lease.attempt, lease.worker_id,
                )  # fmt: skip
                return False
            self._end_attempt(db, lease, "failed", None, None)
            self._requeue(db, lease.chunk, error_class, storable(message))
            self._complete_if_done(db, lease.chunk.job_id)
        return True

    def _tell_overtaken(self, db: Connection, lease: Lease, what: str) -> None:
        """Say in the log that an attempt was taken for lost while it ran. One that ended before is no trouble."""
        if db.execute(sa.select(attempts.c.outcome).where(is_attempt(lease))).scalar() == "lost":
            log.warning(
                "chunk %s/%d: attempt %d of %s %s after its lease was lost",
                lease.chunk.job_id, lease.chunk.number, lease.attempt, lease.worker_id, what,
            )  # fmt: skip

    def _end_attempt(
        self,
        db: Connection,
        lease: Lease,
        outcome: str,
        counters: EngineCounters | None,
        slots: int | None,
        span: tuple[float, float] | None = None,
    ) -> None:
        """``span``: when the attempt began and ended, where that is not the claim and now."""
        times = {"ended_at": self._now()} if span is None else {"started_at": span[0], "ended_at": span[1]}
        ended = db.execute(
            sa.update(attempts)
            .where(is_attempt(lease), attempts.c.ended_at.is_(None))
            .values(**times, outcome=outcome, slots=slots)
        )
        # An attempt ends once, and its counters come with its end: a worker that was not told that its commit went
        # through says it all again.
        if ended.rowcount == 1:
            self._add_counters(db, lease, counters)
            counting(db, lease.model, lease.worker_id).add("redeliveries", outcome == "failed")

    def _end_attempts_before(self, db: Connection, chunk: ChunkId, attempt: int) -> None:
        """A chunk taken back from a dead worker leaves an attempt that nobody closed."""
        lost = db.execute(
            sa.update(attempts)
            .where(
                attempts.c.job_id == chunk.job_id, attempts.c.number == chunk.number, attempts.c.attempt < attempt,
                attempts.c.ended_at.is_(None),
            )
            .values(ended_at=self._now(), outcome="lost")
        )  # fmt: skip
        counting(db, model_of(db, chunk.job_id)).add("redeliveries", lost.rowcount)

    def _requeue(self, db: Connection, chunk: ChunkId, error_class: ErrorClass, message: str) -> None:
        """Put a chunk whose attempt failed back, whole or in pieces. The caller holds its row."""
        row = db.execute(sa.select(chunks).where(is_chunk(chunk))).one()
        failures = row.failures + 1
        # Workers are stopped for many reasons; a lost one proves less than a host that died under one request.
        last = self._max_attempts + (LOST_WORKERS if error_class is ErrorClass.WORKER_LOST and row.rows == 1 else 0)
        if row.ok + row.errors + row.moved == row.rows:
            db.execute(sa.update(chunks).where(is_chunk(chunk)).values(state=ChunkState.DONE.value, leased_until=None))
        elif JobState(db.execute(sa.select(jobs.c.state).where(jobs.c.id == chunk.job_id)).scalar_one()).is_final:
            self._put_back(db, chunk, message, failures, not_before=None)
        elif failures < last:
            # At once the first time: most often it was nothing of the chunk's doing.
            wait = None if failures == 1 else self._not_before(failures - 1)
            self._put_back(db, chunk, message, failures, not_before=wait)
        elif row.rows > 1:
            self._put_back(db, chunk, message, failures, not_before=None)
            self._split(db, chunk)
        else:
            self._give_up(db, chunk, row.first_row, row.attempt, error_class, message)

    def _put_back(self, db: Connection, chunk: ChunkId, message: str, failures: int, not_before: Any) -> None:
        db.execute(
            sa.update(chunks)
            .where(is_chunk(chunk))
            .values(
                state=ChunkState.QUEUED.value, leased_until=None, worker_id=None, published_at=None,
                not_before=not_before, last_error=message, failures=failures,
            )
        )  # fmt: skip

    def _split(self, db: Connection, chunk: ChunkId) -> None:
        """Replace a chunk by pieces, so that one poisonous request parts from its neighbours.

        A piece has one attempt left before it is split in turn: the search for the bad request costs few crashes.
        The chunk itself stays with no rows, for its attempts to refer to; its fencing number is never used again.
        """
        # Two chunks of one job split at once would choose the same numbers.
        self._lock_job(db, chunk.job_id)
        parent = db.execute(sa.select(chunks).where(is_chunk(chunk))).one()
        last = db.execute(sa.select(sa.func.max(chunks.c.number)).where(chunks.c.job_id == chunk.job_id)).scalar()
        assert last is not None
        for number, span in enumerate(_pieces(parent.first_row, parent.rows), start=last + 1):
            self._insert_piece(db, parent, number, span)
        db.execute(
            sa.update(chunks)
            .where(is_chunk(chunk))
            .values(state=ChunkState.DONE.value, rows=0, ok=0, errors=0, moved=0, output_tokens=0)
        )

    def _insert_piece(self, db: Connection, parent: sa.Row[Any], number: int, span: range) -> None:
        # Rows that the parent handed to another chunk are the piece's to leave alone now.
        moved = db.execute(
            sa.update(retries)
            .where(
                retries.c.job_id == parent.job_id, retries.c.chunk == parent.number,
                retries.c.row.between(span.start, span.stop - 1),
            )
            .values(chunk=number)
        ).rowcount  # fmt: skip
        elsewhere = sa.select(retries.c.row).where(retries.c.job_id == parent.job_id, retries.c.chunk == number)
        ok, errors, tokens = counts_between(db, parent.job_id, span, except_rows=elsewhere)
        state = ChunkState.DONE if ok + errors + moved == len(span) else ChunkState.QUEUED
        db.execute(
            sa.insert(chunks).values(
                job_id=parent.job_id, number=number, first_row=span.start, rows=len(span), state=state.value,
                attempt=0, failures=self._max_attempts - 1, ok=ok, errors=errors, moved=moved, output_tokens=tokens,
                last_error=parent.last_error,
            )
        )  # fmt: skip

    def _give_up(
        self, db: Connection, chunk: ChunkId, row: int, attempt: int, error_class: ErrorClass, message: str
    ) -> None:
        """One request, alone, failed for the last time: it ends as an error."""
        values = {
            "job_id": chunk.job_id, "row": row, "state": "error", "error_class": error_class.value,
            "error_message": message, "committed_at": self._now(), "attempt": attempt, "chunk": chunk.number,
        }  # fmt: skip
        db.execute(sa.insert(results).values(values))
        given_up = Failed(row, error_class, message)
        counting(db, model_of(db, chunk.job_id)).results([given_up], enqueued_at=None)
        db.execute(
            sa.update(chunks)
            .where(is_chunk(chunk))
            .values(state=ChunkState.DONE.value, leased_until=None, errors=chunks.c.errors + 1, last_error=message)
        )
        self._judge_guard(db, chunk.job_id)


def _pieces(first_row: int, rows: int) -> list[range]:
    """A chunk's rows in SPLIT_PIECES runs, or one each."""
    size = max(1, -(-rows // SPLIT_PIECES))
    end = first_row + rows
    return [range(start, min(start + size, end)) for start in range(first_row, end, size)]
