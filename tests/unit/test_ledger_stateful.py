"""The ledger under random interleavings of everything that can be done to it, against a model that is a few sets."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from promptmill.database.engine import connect, writing
from promptmill.database.tables import attempts, chunks, jobs, metadata, requests, results, retries
from promptmill.errors import JobError
from promptmill.ledger import Ledger, Standing
from promptmill.types import (
    ErrorClass,
    Failed,
    FinishReason,
    JobState,
    Lease,
    Ok,
    Result,
    Timing,
    Usage,
)
from tests.conftest import by_clock

JOB = "01JOB"
ROWS = 24
LEASE_S = 30.0

#: Long enough for most runs to be busy before they end by it.
DEADLINE_S = 1000.0
TIME_LIMIT_S = 150.0


class LedgerMachine(RuleBasedStateMachine):
    """``answered`` is the model: the rows whose final result was accepted."""

    leases: Bundle[Lease] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self.db = by_clock(connect("sqlite://"), lambda: self.now)
        metadata.create_all(self.db)
        self.ledger = Ledger(self.db, lease_s=LEASE_S)
        self.answered: dict[int, str] = {}
        self.state = JobState.QUEUED
        self.deadline_at = self.now + DEADLINE_S
        #: Ended by a person or a limit: nothing is taken and nothing opens it again.
        self.closed = False

    def teardown(self) -> None:
        self._drain()
        self.db.dispose()

    @initialize(sizes=st.lists(st.integers(1, 8), min_size=3, max_size=8))
    def submit(self, sizes: list[int]) -> None:
        job = {
            "id": JOB, "state": "queued", "mode": "queue", "dataset_name": "d", "dataset_sha256": "0",
            "dataset_format": "f", "model": "echo", "sampling": "{}", "priority": 5, "rows": ROWS, "env": "{}",
            "submitted_at": self.now, "max_errors": str(ROWS), "deadline_at": self.now + DEADLINE_S,
            "time_limit_s": TIME_LIMIT_S,
        }  # fmt: skip
        with writing(self.db) as db:
            db.execute(sa.insert(jobs).values(job))
            for row in range(ROWS):
                db.execute(sa.insert(requests).values(job_id=JOB, row=row, custom_id=str(row), input='{"prompt": "p"}'))
            start = number = 0
            while start < ROWS:
                size = min(sizes[number % len(sizes)], ROWS - start)
                db.execute(
                    sa.insert(chunks).values(
                        job_id=JOB, number=number, first_row=start, rows=size, state="queued", attempt=0, ok=0,
                        errors=0, output_tokens=0,
                    )
                )  # fmt: skip
                start, number = start + size, number + 1

    # --- what workers do ---------------------------------------------------------------------------------------------

    @rule(target=leases, worker=st.sampled_from("abc"))
    def claim(self, worker: str) -> Any:
        lease = self.ledger.claim_next(JOB, worker)
        if lease is None:
            return _nothing()
        assert self.state in (JobState.QUEUED, JobState.RUNNING)
        self.state = JobState.RUNNING
        return lease

    @rule(lease=leases, data=st.data())
    def record(self, lease: Lease, data: st.DataObject) -> None:
        if lease is not None:
            self._record(lease, data)

    @rule(lease=leases, data=st.data())
    def finish(self, lease: Lease, data: st.DataObject) -> None:
        """With whatever results; the ledger must refuse the end while rows are missing."""
        if lease is None:
            return
        held = self._held(lease)
        batch = self._some(lease, data)
        done = self.ledger.finish(lease, last=batch)
        assert held or not done
        self._learn(lease)
        if done:
            assert not self.ledger.pending(lease)
        self._look()

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        if lease is not None:
            held = self._held(lease)
            assert self.ledger.release(lease) == held

    @rule(lease=leases, error=st.sampled_from([ErrorClass.ENGINE_CRASH, ErrorClass.WORKER_LOST]))
    def fail(self, lease: Lease, error: ErrorClass) -> None:
        if lease is not None:
            held = self._held(lease)
            assert self.ledger.fail(lease, error, "it died") == held
            self._learn(lease)
            self._look()

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        if lease is not None and self.ledger.renew(lease) is Standing.HELD:
            assert self.state is JobState.RUNNING or self.state is JobState.QUEUED

    # --- what time and people do -------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1.0, 10.0, 31.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def reconcile(self) -> None:
        self.ledger.requeue_expired()
        self.ledger.take_window(JOB, 3)
        self._learn(None)
        self._look()

    @rule(seconds=st.sampled_from([0.0, 50.0]))
    def lose_messages(self, seconds: float) -> None:
        self.ledger.unpublish(JOB, seconds)
        self.ledger.complete_jobs()

    @rule()
    def process_dies(self) -> None:
        """An embedded job is taken over by another process."""
        self.ledger.abandon_leases(JOB)

    @rule()
    def pause(self) -> None:
        self.ledger.pause(JOB)
        self._look()

    @rule()
    def resume(self) -> None:
        self._look()
        before = self.state
        try:
            self.ledger.resume(JOB)
        except JobError:
            assert before.is_final
            return
        assert not self.closed
        self._look()

    @rule()
    def cancel(self) -> None:
        self._look()
        before = self.state
        assert self.ledger.cancel(JOB) == (not before.is_final)
        self._look()
        assert self.state is (before if before.is_final else JobState.CANCELLED)
        self.closed |= not before.is_final

    @rule()
    def stop(self) -> None:
        """Its model does not load."""
        self._look()
        before = self.state
        is_open = before in (JobState.QUEUED, JobState.RUNNING)
        assert self.ledger.stop(JOB, "no model") == is_open
        self._look()
        assert self.state is (JobState.FAILED if is_open else before)

    @rule()
    def expire(self) -> None:
        self._look()
        before = self.state
        ended = self.ledger.expire_overdue()
        self._look()
        if ended:
            assert ended == [JOB]
            assert not before.is_final
            assert self.state is JobState.EXPIRED
            self.closed = True
        else:
            assert self.state is before
            assert before.is_final or self.now <= self.deadline_at

    @rule(
        error=st.sampled_from([None, None, ErrorClass.TIMEOUT, ErrorClass.ENGINE_CRASH]),
        later_s=st.sampled_from([0.0, TIME_LIMIT_S + 1]),
    )
    def retry(self, error: ErrorClass | None, later_s: float) -> None:
        self._look()
        if self.state.is_final:
            self.now += later_s
        everything = self._everything()
        try:
            again = self.ledger.retry(JOB, error)
        except JobError:
            assert self._everything() == everything
            return
        assert not self.closed
        assert self.now <= self.deadline_at
        self._look()
        if again:
            assert self.state is JobState.QUEUED
            # The limits count from the retry.
            assert self.ledger.expire_overdue() == []
        for row, state in list(self.answered.items()):
            if state == "error":
                del self.answered[row]
        self._learn(None)
        self._look()

    @rule()
    def fail_and_retry_much_later(self) -> None:
        """Of itself chance comes this far too rarely: a row has failed, its job has ended, its limit is long past."""
        lease = self.ledger.claim_next(JOB, "d")
        if lease is None:
            return
        self.ledger.record(lease, [_result(each.row, "overflow") for each in self.ledger.pending(lease)])
        self.ledger.release(lease)
        self._learn(lease)
        self.stop()
        self.retry(None, TIME_LIMIT_S + 1)

    # --- what must always hold ---------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        """Accepted answers stay, and stay what they were."""
        stored = dict(self._read(sa.select(results.c.row, results.c.state)))
        for row, state in self.answered.items():
            assert stored.get(row) == state, f"row {row} was {state} and is {stored.get(row)}"

    @invariant()
    def counts_agree(self) -> None:
        rows = self._read(sa.select(chunks.c.rows, chunks.c.moved, chunks.c.ok, chunks.c.errors))
        if not rows:
            return
        assert sum(size - moved for size, moved, _, _ in rows) == ROWS
        stored = [state for (state,) in self._read(sa.select(results.c.state))]
        assert sum(ok for _, _, ok, _ in rows) == stored.count("ok")
        assert sum(errors for _, _, _, errors in rows) == stored.count("error")
        assert all(ok + errors + moved <= size for size, moved, ok, errors in rows)

    @invariant()
    def no_row_is_in_two_unfinished_chunks(self) -> None:
        taken: set[int] = set()
        answered = {row for (row,) in self._read(sa.select(results.c.row))}
        moved = set(self._read(sa.select(retries.c.row, retries.c.chunk)))
        spans = sa.select(chunks.c.number, chunks.c.first_row, chunks.c.rows).where(chunks.c.state != "done")
        for number, first, size in self._read(spans):
            rows = {row for row in range(first, first + size) if row not in answered and (row, number) not in moved}
            assert not rows & taken
            taken |= rows
        if self._read(sa.select(jobs.c.id)):
            assert taken | answered == set(range(ROWS))

    @invariant()
    def an_attempt_is_open_only_while_it_is_leased(self) -> None:
        open_ones = self._read(sa.select(attempts.c.number, attempts.c.attempt).where(attempts.c.ended_at.is_(None)))
        leased = self._read(sa.select(chunks.c.number, chunks.c.attempt).where(chunks.c.state == "leased"))
        assert set(open_ones) == set(leased)

    @invariant()
    def what_is_closed_stays_closed(self) -> None:
        if self.closed:
            assert self.ledger.progress(JOB).state in (JobState.CANCELLED, JobState.EXPIRED)

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _record(self, lease: Lease, data: st.DataObject) -> None:
        held, batch = self._held(lease), self._some(lease, data)
        taken = self.ledger.record(lease, batch)
        assert taken == (len(batch) if held and not self.state.is_final else 0)
        self._learn(lease)
        self._look()

    def _some(self, lease: Lease, data: st.DataObject) -> list[tuple[Result, int]]:
        """Results of some of the rows that the lease still owes. A worker answers each only once."""
        pending = [each.row for each in self.ledger.pending(lease)]
        if not pending or self.ledger.standing(lease) is Standing.LOST:
            return [_result(lease.first_row, "ok")] if pending else []
        rows = data.draw(st.lists(st.sampled_from(pending), unique=True, max_size=len(pending)))
        return [_result(row, data.draw(st.sampled_from(["ok", "ok", "ok", "timeout", "overflow"]))) for row in rows]

    def _held(self, lease: Lease) -> bool:
        """By the rows, not by the ledger's own word."""
        held = sa.select(chunks.c.number).where(
            chunks.c.number == lease.chunk.number, chunks.c.state == "leased", chunks.c.attempt == lease.attempt
        )
        return bool(self._read(held))

    def _learn(self, lease: Lease | None) -> None:
        self.answered |= dict(self._read(sa.select(results.c.row, results.c.state)))

    def _everything(self) -> list[Any]:
        return [self._read(sa.select(table)) for table in (jobs, chunks, attempts, results, retries)]

    def _look(self) -> None:
        self.state = self.ledger.progress(JOB).state

    def _read(self, query: Any) -> list[Any]:
        with self.db.connect() as db:
            return [tuple(row) for row in db.execute(query)]

    def _drain(self) -> None:
        """Whatever happened, a job that is not cancelled comes to its end once somebody works on it."""
        if not self._read(sa.select(jobs.c.id)):
            return
        try:
            self.ledger.resume(JOB)
        except JobError:
            return
        for _ in range(1000):
            self.now += 61
            self.ledger.requeue_expired()
            lease = self.ledger.claim_next(JOB, "last")
            if lease is not None:
                batch = [_result(each.row, "ok") for each in self.ledger.pending(lease)]
                assert self.ledger.finish(lease, last=batch)
            elif self.ledger.progress(JOB).state.is_final:
                break
        progress = self.ledger.progress(JOB)
        assert progress.state.is_final, progress
        assert progress.done == ROWS, progress


def _nothing() -> Any:
    from hypothesis.stateful import multiple

    return multiple()


def _result(row: int, kind: str) -> tuple[Result, int]:
    if kind == "ok":
        return Ok(row, "answer", FinishReason.STOP, Usage(5, 0, 3), Timing(1, 2, 3, 4)), 16
    error = ErrorClass.TIMEOUT if kind == "timeout" else ErrorClass.CONTEXT_OVERFLOW
    return Failed(row, error, "no"), 16


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLedger = LedgerMachine.TestCase
