"""The ledger: errors that are tried again, by itself and by hand, pausing, deadlines, ambiguous commits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect, writing
from promptmill.database.tables import attempts, chunks, jobs, metadata, requests, results, retries
from promptmill.errors import JobError
from promptmill.ledger import Ledger, Standing, waiting_requests
from promptmill.types import (
    WITHOUT_TEXTS,
    ChunkId,
    EngineCounters,
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


@pytest.fixture
def db() -> Iterator[sa.Engine]:
    engine = connect("sqlite://")
    metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def ledger(db: sa.Engine, clock: Any) -> Ledger:
    return Ledger(by_clock(db, clock))


def add_job(db: sa.Engine, rows: int, **values: Any) -> None:
    job = {
        "id": JOB, "state": "queued", "mode": "queue", "dataset_name": "d", "dataset_sha256": "0",
        "dataset_format": "f", "model": "echo", "sampling": "{}", "priority": 5, "rows": rows, "env": "{}",
        "submitted_at": 0.0,
    } | values  # fmt: skip
    with writing(db) as connection:
        connection.execute(sa.insert(jobs).values(job))
        for row in range(rows):
            connection.execute(
                sa.insert(requests).values(job_id=JOB, row=row, custom_id=str(row), input='{"prompt": "p"}')
            )
        connection.execute(
            sa.insert(chunks).values(
                job_id=JOB, number=0, first_row=0, rows=rows, state="queued", attempt=0, ok=0, errors=0,
                output_tokens=0,
            )
        )  # fmt: skip


def ok(row: int) -> tuple[Result, int]:
    return Ok(row, "answer", FinishReason.STOP, Usage(5, 0, 3), Timing(1, 2, 3, 4)), 16


def late(row: int) -> tuple[Result, int]:
    return Failed(row, ErrorClass.TIMEOUT, "no answer within 1 s", Usage(5, 0, 2), Timing(1, 2, 3, 4)), 16


def broken(row: int) -> tuple[Result, int]:
    return Failed(row, ErrorClass.CONTEXT_OVERFLOW, "too long"), 16


def claim(ledger: Ledger) -> Lease:
    lease = ledger.claim_next(JOB, "a")
    assert lease is not None
    return lease


def rows_of(ledger: Ledger, lease: Lease) -> list[int]:
    return [each.row for each in ledger.pending(lease)]


def read(db: sa.Engine, query: sa.Select[Any]) -> list[Any]:
    with db.connect() as connection:
        return [tuple(row) for row in connection.execute(query)]


def test_a_timeout_is_tried_again_after_a_wait_and_its_error_kept(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 4)
    first = claim(ledger)
    assert ledger.finish(first, last=[ok(0), late(1), late(2), broken(3)])
    assert ledger.is_open(JOB)
    assert ledger.claim_next(JOB, "a") is None
    clock.advance(2)
    again = claim(ledger)
    assert rows_of(ledger, again) == [1, 2]
    assert ledger.finish(again, last=[ok(1), ok(2)])
    progress = ledger.progress(JOB)
    assert (progress.state, progress.ok, progress.errors) == (JobState.COMPLETED, 3, 1)
    kept = sa.select(retries.c.row, retries.c.chunk, retries.c.error_class).order_by(retries.c.row)
    assert read(db, kept) == [(1, 0, "timeout"), (2, 0, "timeout")]


def test_the_last_timeout_is_an_error(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 1)
    tries = 0
    while (lease := ledger.claim_next(JOB, "a")) is not None:
        tries += 1
        ledger.finish(lease, last=[late(0)])
        clock.advance(60)
    assert tries == 3
    assert ledger.progress(JOB).state is JobState.FAILED
    assert read(db, sa.select(sa.func.count()).select_from(retries)) == [(2,)]


def test_a_chunk_that_gave_rows_away_can_still_be_split(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 16)
    lease = claim(ledger)
    ledger.record(lease, [ok(0), late(5)])
    for _ in range(3):
        ledger.fail(lease, ErrorClass.ENGINE_CRASH, "crash")
        clock.advance(60)
        lease = claim(ledger) if ledger.is_open(JOB) else lease
    answered = {0}
    while True:
        rows = rows_of(ledger, lease)
        assert not answered & set(rows), "a row was given to two chunks"
        answered |= set(rows)
        ledger.finish(lease, last=[ok(row) for row in rows])
        following = ledger.claim_next(JOB, "a")
        if following is None:
            break
        lease = following
    assert answered == set(range(16))
    assert ledger.progress(JOB).state is JobState.COMPLETED
    assert read(db, sa.select(sa.func.sum(chunks.c.ok), sa.func.sum(chunks.c.rows - chunks.c.moved))) == [(16, 16)]


def test_a_row_that_was_given_away_before_a_split_is_run_again_by_hand(
    ledger: Ledger, db: sa.Engine, clock: Any
) -> None:
    """The piece that spans it is younger than the chunk it was given to, and has given it away."""
    add_job(db, 16)
    ledger.record(lease := claim(ledger), [late(5)])
    for _ in range(3):
        ledger.fail(lease, ErrorClass.ENGINE_CRASH, "crash")
        clock.advance(60)
        lease = ledger.claim(ChunkId(JOB, 0), "a") or lease
    while (other := ledger.claim_next(JOB, "b")) is not None:
        ledger.finish(other, last=[broken(row) if row == 5 else ok(row) for row in rows_of(ledger, other)])
    for _ in range(2):
        assert ledger.retry(JOB) == 1
        again = claim(ledger)
        assert rows_of(ledger, again) == [5]
        assert ledger.finish(again, last=[broken(5)])
    counts = sa.select(sa.func.sum(chunks.c.ok), sa.func.sum(chunks.c.errors), sa.func.min(chunks.c.errors))
    assert read(db, counts) == [(15, 1, 0)]


@pytest.mark.parametrize("store", WITHOUT_TEXTS)
def test_nothing_is_run_again_without_its_prompts(ledger: Ledger, db: sa.Engine, store: str) -> None:
    add_job(db, 2, store=store)
    ledger.record(claim(ledger), [broken(0)])
    ledger.stop(JOB, "too many errors")
    before = read(db, sa.select(jobs)) + read(db, sa.select(chunks))
    for again in (ledger.retry, ledger.resume):
        with pytest.raises(JobError, match="has lost its prompts"):
            again(JOB)
    assert read(db, sa.select(jobs)) + read(db, sa.select(chunks)) == before


def test_errors_of_an_ended_job_are_run_again_by_hand(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 6)
    assert ledger.finish(claim(ledger), last=[ok(0), broken(1), broken(2), ok(3), broken(4), ok(5)])
    assert ledger.retry(JOB, ErrorClass.GRAMMAR) == 0
    assert ledger.progress(JOB).state is JobState.COMPLETED
    assert ledger.retry(JOB) == 3
    seen = []
    while (lease := ledger.claim_next(JOB, "b")) is not None:
        seen.append(rows_of(ledger, lease))
        ledger.finish(lease, last=[ok(row) if row != 4 else broken(4) for row in seen[-1]])
    assert seen == [[1, 2], [4]]
    progress = ledger.progress(JOB)
    assert (progress.state, progress.ok, progress.errors) == (JobState.COMPLETED, 5, 1)
    # And once more: row 4 now counts in a younger chunk.
    assert ledger.retry(JOB) == 1
    ledger.finish(claim(ledger), last=[ok(4)])
    assert ledger.progress(JOB).ok == 6
    assert read(db, sa.select(sa.func.count()).select_from(retries).where(retries.c.row == 4)) == [(2,)]


def test_a_running_or_cancelled_job_is_not_retried(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 1)
    with pytest.raises(JobError, match="once it has ended"):
        ledger.retry(JOB)
    ledger.cancel(JOB)
    with pytest.raises(JobError, match="nothing of it is run again"):
        ledger.retry(JOB)


def test_a_pause_says_to_start_nothing_more(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 2)
    lease = claim(ledger)
    ledger.pause(JOB)
    assert ledger.standing(lease) is Standing.PAUSED
    assert ledger.renew(lease) is Standing.PAUSED
    assert ledger.record(lease, [ok(0)]) == 1


@pytest.mark.parametrize(
    ("values", "started", "after_s", "reason"),
    [
        ({"deadline_at": 1_000_050.0}, True, 60, "past its deadline"),
        ({"expires_at": 1_000_050.0}, False, 60, "not begun in time"),
        ({"time_limit_s": 30.0}, True, 31, "over its time limit"),
    ],
)
def test_time_limits_end_a_job(
    ledger: Ledger, db: sa.Engine, clock: Any, values: dict[str, float], started: bool, after_s: float, reason: str
) -> None:
    add_job(db, 2, **values)
    lease = claim(ledger) if started else None
    assert ledger.expire_overdue() == []
    clock.advance(after_s)
    assert ledger.expire_overdue() == [JOB]
    assert ledger.expire_overdue() == []
    progress = ledger.progress(JOB)
    assert (progress.state, progress.stop_reason) == (JobState.EXPIRED, reason)
    if lease:
        assert ledger.standing(lease) is Standing.UNWANTED
        assert ledger.record(lease, [ok(0)]) == 0


def test_a_job_that_began_in_time_does_not_expire(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, expires_at=1_000_050.0)
    claim(ledger)
    clock.advance(100)
    assert ledger.expire_overdue() == []


def test_a_batch_that_may_have_been_stored_is_stored_once(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 3)
    lease = claim(ledger)
    ledger.record(lease, [ok(0), late(1)], EngineCounters(decode_tokens=5))
    ledger.record(lease, [ok(0), late(1)], EngineCounters(decode_tokens=5), maybe_stored=True)
    assert ledger.finish(lease, EngineCounters(decode_tokens=2), 4, [ok(0), ok(2)], maybe_stored=True)
    assert read(db, sa.select(results.c.row).order_by(results.c.row)) == [(0,), (2,)]
    assert read(db, sa.select(attempts.c.decode_tokens, attempts.c.slots)) == [(7, 4)]


def test_what_a_lost_attempt_did_is_known_up_to_its_last_record(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2)
    lease = claim(ledger)
    ledger.record(lease, [ok(0)], EngineCounters(decode_tokens=5, prefill_s=0.5, peak_active=2))
    clock.advance(60)
    ledger.requeue_expired()
    columns = (attempts.c.outcome, attempts.c.decode_tokens, attempts.c.prefill_s, attempts.c.peak_active)
    assert read(db, sa.select(*columns)) == [("lost", 5, 0.5, 2)]


def test_waiting_requests_are_counted(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 3)

    def waiting(mode: str) -> int:
        with db.connect() as connection:
            return waiting_requests(connection, mode)

    assert waiting("queue") == 3
    ledger.record(claim(ledger), [ok(0), late(1)])
    assert waiting("queue") == 2
    assert waiting("embedded") == 0


def test_the_counters_of_a_finished_chunk_belong_to_its_attempt(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 1)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.finish(lease, EngineCounters(steps=3, peak_active=1), 2, [ok(0)])
    assert read(db, sa.select(attempts.c.steps, attempts.c.outcome)) == [(3, "done")]


def test_a_job_whose_last_chunks_missed_each_other_is_closed(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 2)
    lease = claim(ledger)
    ledger.record(lease, [ok(0), ok(1)])
    with writing(db) as connection:
        connection.execute(sa.update(chunks).values(state="done"))
    assert ledger.is_open(JOB)
    ledger.complete_jobs()
    assert ledger.progress(JOB).state is JobState.COMPLETED


def test_an_end_that_is_said_twice_is_counted_once(ledger: Ledger, db: sa.Engine) -> None:
    """The commit of the end went through, and the worker was not told: it ends its attempt again."""
    add_job(db, 2)
    lease = claim(ledger)
    ledger.record(lease, [ok(0)], EngineCounters(decode_tokens=3))
    assert ledger.finish(lease, EngineCounters(decode_tokens=4), 2, [ok(1)])

    assert not ledger.finish(lease, EngineCounters(decode_tokens=4), 2, [ok(1)], maybe_stored=True)
    assert not ledger.release(lease, EngineCounters(decode_tokens=4), 2)

    assert read(db, sa.select(attempts.c.decode_tokens, attempts.c.outcome)) == [(7, "done")]
    assert ledger.progress(JOB).state is JobState.COMPLETED


def all_failed(ledger: Ledger) -> None:
    """Run the job to an end with an error in every row that is left."""
    while (lease := ledger.claim_next(JOB, "a")) is not None:
        assert ledger.finish(lease, last=[broken(row) for row in rows_of(ledger, lease)])


def test_a_retry_has_a_time_limit_of_its_own(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, time_limit_s=30.0)
    all_failed(ledger)
    clock.advance(3600)
    assert ledger.retry(JOB) == 2
    clock.advance(3600)
    # Nobody has begun with it yet.
    assert ledger.expire_overdue() == []
    lease = claim(ledger)
    clock.advance(29)
    assert ledger.expire_overdue() == []
    assert ledger.finish(lease, last=[ok(0), ok(1)])
    assert ledger.progress(JOB).state is JobState.COMPLETED


def test_a_retry_ends_at_its_own_time_limit(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, time_limit_s=30.0)
    all_failed(ledger)
    clock.advance(3600)
    ledger.retry(JOB)
    claim(ledger)
    clock.advance(31)
    assert ledger.expire_overdue() == [JOB]


def test_nothing_is_retried_past_the_deadline_and_nothing_changed(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, deadline_at=clock() + 60)
    all_failed(ledger)
    clock.advance(61)
    everything = [read(db, sa.select(table)) for table in (jobs, chunks, results, retries)]
    with pytest.raises(JobError, match="past its deadline"):
        ledger.retry(JOB)
    assert [read(db, sa.select(table)) for table in (jobs, chunks, results, retries)] == everything


def test_a_failed_job_is_not_resumed_past_its_deadline(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, deadline_at=clock() + 60)
    ledger.stop(JOB, "no such model")
    clock.advance(61)
    with pytest.raises(JobError, match="past its deadline"):
        ledger.resume(JOB)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_time_limit_stands_still_while_nothing_may_run(
    ledger: Ledger, db: sa.Engine, clock: Any, stopped: bool
) -> None:
    add_job(db, 2, time_limit_s=30.0)
    ledger.release(claim(ledger))
    clock.advance(20)
    assert ledger.stop(JOB, "no model") if stopped else ledger.pause(JOB)
    clock.advance(3600)
    assert ledger.expire_overdue() == []
    ledger.resume(JOB)
    claim(ledger)
    clock.advance(9)
    assert ledger.expire_overdue() == []
    clock.advance(2)
    assert ledger.expire_overdue() == [JOB]


@pytest.mark.parametrize("how", ["reconciler", "resume"])
def test_a_paused_job_with_every_row_done_completes(ledger: Ledger, db: sa.Engine, how: str) -> None:
    add_job(db, 2)
    lease = claim(ledger)
    ledger.pause(JOB)
    ledger.record(lease, [ok(0), ok(1)])
    # Its last two chunks missed each other: none of them saw that the job was done.
    with writing(db) as connection:
        connection.execute(sa.update(chunks).values(state="done", leased_until=None))
    assert ledger.progress(JOB).state is JobState.PAUSED
    if how == "resume":
        ledger.resume(JOB)
    else:
        ledger.complete_jobs()
    assert ledger.progress(JOB).state is JobState.COMPLETED


def test_a_paused_job_whose_last_chunk_was_not_closed_can_be_resumed(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 2)
    ledger.record(claim(ledger), [ok(0), ok(1)])
    ledger.pause(JOB)
    ledger.resume(JOB)
    ledger.abandon_leases(JOB)
    again = claim(ledger)
    assert rows_of(ledger, again) == []
    assert ledger.finish(again)
    assert ledger.progress(JOB).state is JobState.COMPLETED
