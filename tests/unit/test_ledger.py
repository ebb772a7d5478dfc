"""The ledger: leases, fencing, guards, splitting. One body over both databases (PostgreSQL in tests/integration)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.engine import connect, writing
from promptmill.database.tables import attempts, chunks, jobs, metadata, requests, results
from promptmill.errors import DatabaseError, JobError
from promptmill.ledger import LEASE_S, Ledger, Standing, guard_verdict, recovery
from promptmill.types import (
    ChunkId,
    EngineCounters,
    ErrorClass,
    Extras,
    Failed,
    FinishReason,
    JobState,
    Lease,
    Ok,
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


def add_job(db: sa.Engine, rows: int, chunk_rows: int, **values: Any) -> None:
    job = {
        "id": JOB,
        "state": "queued",
        "mode": "queue",
        "dataset_name": "d",
        "dataset_sha256": "0",
        "dataset_format": "f",
        "model": "echo",
        "sampling": "{}",
        "priority": 5,
        "rows": rows,
        "env": "{}",
        "submitted_at": 0.0,
    } | values
    with writing(db) as connection:
        connection.execute(sa.insert(jobs).values(job))
        for row in range(rows):
            connection.execute(
                sa.insert(requests).values(job_id=JOB, row=row, custom_id=f"r{row}", input='{"prompt": "p"}')
            )
        for number, first in enumerate(range(0, rows, chunk_rows)):
            connection.execute(
                sa.insert(chunks).values(
                    job_id=JOB,
                    number=number,
                    first_row=first,
                    rows=min(chunk_rows, rows - first),
                    state="queued",
                    attempt=0,
                    ok=0,
                    errors=0,
                    output_tokens=0,
                )
            )


def ok(row: int, tokens: int = 3) -> tuple[Ok, int]:
    return Ok(row, f"answer {row}", FinishReason.STOP, Usage(5, 0, tokens), Timing(1.0, 2.0, 3.0, 4.0)), 16


def failed(row: int) -> tuple[Failed, int]:
    return Failed(row, ErrorClass.INTERNAL, "no"), 16


def column(db: sa.Engine, query: sa.Select[Any]) -> list[Any]:
    with db.connect() as connection:
        return list(connection.execute(query).scalars())


def lose_lease(ledger: Ledger, clock: Any) -> None:
    """Let every lease run out, have it noticed, and wait the back-off."""
    clock.advance(LEASE_S + 1)
    ledger.requeue_expired()
    clock.advance(5)


def test_a_chunk_has_one_holder(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 4, 4)
    assert ledger.claim(ChunkId(JOB, 0), "a") is not None
    assert ledger.claim(ChunkId(JOB, 0), "b") is None


def test_the_most_urgent_job_of_a_model_goes_first(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 2, 2)
    with writing(db) as connection:
        connection.execute(sa.update(chunks).values(published_at=1.0))
        for table, changes in ((jobs, {"id": "urgent", "priority": 1}), (chunks, {"job_id": "urgent"})):
            like = dict(connection.execute(sa.select(table)).mappings().first() or {})
            connection.execute(sa.insert(table).values(like | changes))
    taken = [ledger.claim_of_model("echo", "a") for _ in range(3)]
    assert [each and each.chunk.job_id for each in taken] == ["urgent", JOB, None]


def test_claiming_starts_the_job(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 4, 4)
    ledger.claim(ChunkId(JOB, 0), "a")
    assert ledger.progress(JOB).state is JobState.RUNNING


def test_an_overtaken_worker_changes_nothing(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, 2)
    late = ledger.claim(ChunkId(JOB, 0), "a")
    assert late is not None
    lose_lease(ledger, clock)
    ahead = ledger.claim(ChunkId(JOB, 0), "b")
    assert ahead is not None
    assert ahead.attempt == 2
    assert ledger.record(late, [ok(0)]) == 0
    assert ledger.renew(late) is Standing.LOST
    assert not ledger.finish(late)
    assert not ledger.release(late)
    assert not ledger.fail(late, ErrorClass.ENGINE_CRASH, "x")
    assert ledger.record(ahead, [ok(0), ok(1)]) == 2
    assert ledger.finish(ahead)
    assert column(db, sa.select(attempts.c.outcome).order_by(attempts.c.attempt)) == ["lost", "done"]


def test_renewal_keeps_a_lease(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, 2)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    for _ in range(5):
        clock.advance(LEASE_S - 1)
        assert ledger.renew(lease) is Standing.HELD
    assert ledger.claim(ChunkId(JOB, 0), "b") is None


def test_only_rows_without_a_result_are_pending(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 3, 3)
    first = ledger.claim(ChunkId(JOB, 0), "a")
    assert first is not None
    ledger.record(first, [ok(1)])
    lose_lease(ledger, clock)
    second = ledger.claim(ChunkId(JOB, 0), "b")
    assert second is not None
    assert [row.row for row in ledger.pending(second)] == [0, 2]


def test_a_chunk_with_missing_rows_cannot_be_finished(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 2, 2)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.record(lease, [ok(0)])
    assert not ledger.finish(lease)
    assert ledger.release(lease)
    assert ledger.claim(ChunkId(JOB, 0), "b") is not None


def test_answers_that_a_cancelled_job_does_not_take_are_wasted(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 3, 3)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.record(lease, [ok(0)], EngineCounters(decode_tokens=3))
    ledger.cancel(JOB)
    assert ledger.record(lease, [ok(1, tokens=7)], EngineCounters(decode_tokens=7)) == 0
    assert ledger.release(lease, EngineCounters(decode_tokens=7), 4, [ok(0), ok(1, tokens=7)])
    with db.connect() as connection:
        books = connection.execute(sa.select(attempts.c.decode_tokens, attempts.c.wasted_tokens)).one()
    assert tuple(books) == (10, 7)


def test_tokens_of_copied_answers_are_counted_nowhere(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 3, 3)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    copied = Ok(1, "answer", FinishReason.STOP, Usage(5, 0, 100), None, Extras(deduplicated=True))
    ledger.record(lease, [ok(0), (copied, 16)])
    assert ledger.progress(JOB).output_tokens == 3
    for _ in range(3):
        ledger.fail(lease, ErrorClass.ENGINE_CRASH, "crash")
        with db.begin() as connection:
            connection.execute(sa.update(chunks).values(not_before=None))
        lease = ledger.claim_next(JOB, "a") or lease
    # The pieces that the chunk was split into know as much.
    assert column(db, sa.select(sa.func.count()).select_from(chunks)) == [4]
    assert ledger.progress(JOB).output_tokens == 3


def test_an_attempt_lasts_from_its_claim_until_its_chunk_is_closed(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 1, 1)
    claimed_at = clock.now
    lease = ledger.claim(ChunkId(JOB, 0), "w1")
    assert lease is not None
    clock.now += 5.9
    assert ledger.finish(lease, last=[ok(0)])
    with db.connect() as connection:
        row = connection.execute(sa.select(attempts)).one()
    assert (row.started_at, row.ended_at) == pytest.approx((claimed_at, claimed_at + 5.9))


def test_the_last_chunk_completes_the_job(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 3, 2)
    for number, rows in ((0, [0, 1]), (1, [2])):
        lease = ledger.claim(ChunkId(JOB, number), "a")
        assert lease is not None
        ledger.record(lease, [ok(row) for row in rows])
        assert ledger.finish(lease, EngineCounters(steps=7), slots=4)
    progress = ledger.progress(JOB)
    assert (progress.state, progress.ok, progress.errors, progress.output_tokens) == (JobState.COMPLETED, 3, 0, 9)


def test_a_job_whose_every_row_failed_is_no_success(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 2, 2)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.record(lease, [failed(0), failed(1)])
    ledger.finish(lease)
    assert ledger.progress(JOB).state is JobState.FAILED


def test_the_default_guard_stops_a_job_that_is_plainly_wrong(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 100, 50)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.record(lease, [failed(row) for row in range(50)])
    progress = ledger.progress(JOB)
    assert progress.state is JobState.FAILED
    assert progress.stop_reason == "the first 50 rows all failed"
    assert ledger.claim(ChunkId(JOB, 1), "a") is None


@pytest.mark.parametrize(
    ("spec", "ok_rows", "errors", "stops"),
    [
        (None, 0, 49, False), (None, 0, 50, True), (None, 1, 500, False),
        ("0", 5, 1, True), ("3", 0, 3, False), ("3", 0, 4, True),
        ("10%", 40, 9, False), ("10%", 45, 5, False), ("10%", 44, 6, True),
    ],
)  # fmt: skip
def test_the_guard_judges_counts_and_shares(spec: str | None, ok_rows: int, errors: int, stops: bool) -> None:
    assert (guard_verdict(spec, ok_rows, errors) is not None) is stops


def test_a_chunk_that_failed_twice_waits_its_back_off(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, 2)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.fail(lease, ErrorClass.ENGINE_CRASH, "crash")
    again = ledger.claim_next(JOB, "a")
    assert again is not None
    ledger.fail(again, ErrorClass.ENGINE_CRASH, "crash")
    assert ledger.claim_next(JOB, "a") is None
    clock.advance(1.3)
    assert ledger.claim_next(JOB, "a") is not None


def test_giving_back_brings_a_chunk_no_nearer_to_its_last_attempt(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 2, 2)
    for _ in range(10):
        lease = ledger.claim(ChunkId(JOB, 0), "a")
        assert lease is not None
        assert not ledger.is_suspect(lease)
        ledger.release(lease)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    assert lease.attempt == 11
    ledger.fail(lease, ErrorClass.ENGINE_CRASH, "crash")
    assert column(db, sa.select(chunks.c.rows)) == [2]


def test_the_last_attempt_is_suspect(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, 2)
    suspects = []
    for _ in range(3):
        lease = ledger.claim_next(JOB, "a")
        assert lease is not None
        suspects.append(ledger.is_suspect(lease))
        lose_lease(ledger, clock)
    assert suspects == [False, False, True]


def test_requests_that_are_given_up_count_for_the_guard(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 4, 1)
    with writing(db) as connection:
        connection.execute(sa.update(jobs).values(max_errors="0"))
    while (lease := ledger.claim_next(JOB, "a")) is not None:
        ledger.fail(lease, ErrorClass.ENGINE_CRASH, "crash")
        clock.advance(60)
    assert ledger.progress(JOB).stop_reason == "1 of 1 rows failed, more than --max-errors 0"


def test_lines_skipped_on_purpose_do_not_count_for_the_guard(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 4, 4)
    with writing(db) as connection:
        connection.execute(sa.update(jobs).values(max_errors="1", skipped=2))
        connection.execute(sa.update(chunks).values(errors=2))
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.record(lease, [failed(0)])
    assert ledger.is_open(JOB)
    ledger.record(lease, [failed(1)])
    assert ledger.progress(JOB).stop_reason == "2 of 2 rows failed, more than --max-errors 1"


def test_one_poisonous_request_ends_alone(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    """Row 37 ends its host each time it is tried; the others are answered."""
    add_job(db, 64, 64)
    crashes = 0
    for _ in range(200):
        lease = ledger.claim_next(JOB, "a")
        if lease is None:
            clock.advance(60)
            if not ledger.is_open(JOB):
                break
            continue
        rows = [row.row for row in ledger.pending(lease)]
        if 37 in rows:
            crashes += 1
            ledger.fail(lease, ErrorClass.ENGINE_CRASH, "signal 6")
        else:
            ledger.record(lease, [ok(row) for row in rows])
            ledger.finish(lease)
    assert ledger.progress(JOB).state is JobState.COMPLETED
    assert column(db, sa.select(results.c.row).where(results.c.state == "error")) == [37]
    assert column(db, sa.select(sa.func.count()).select_from(results)) == [64]
    assert column(db, sa.select(sa.func.sum(chunks.c.rows))) == [64]
    assert crashes <= 6


def test_many_poisonous_requests_are_searched_for_one_by_one(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    """One in each chunk: the pieces of the first go before the second is begun, so that answers come between deaths."""
    add_job(db, 160, 16)
    bad, in_a_row, most = set(range(5, 160, 16)), 0, 0
    while ledger.is_open(JOB):
        lease = ledger.claim_next(JOB, "a")
        if lease is None:
            clock.advance(60)
            continue
        rows = [row.row for row in ledger.pending(lease)]
        if bad & set(rows):
            in_a_row += 1
            ledger.fail(lease, ErrorClass.ENGINE_CRASH, "signal 6")
            # The next host takes its time.
            clock.advance(1)
        else:
            in_a_row = 0
            ledger.record(lease, [ok(row) for row in rows])
            ledger.finish(lease)
        most = max(most, in_a_row)
    assert column(db, sa.select(results.c.row).where(results.c.state == "error").order_by("row")) == sorted(bad)
    assert ledger.progress(JOB).ok == 150
    # Three attempts of the first, others while it waits out its back-off, and its piece.
    assert most <= 6


def test_what_failed_is_published_before_what_is_new(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 10, 1)
    ledger.take_window(JOB, 6)
    lease = ledger.claim(ChunkId(JOB, 4), "a")
    assert lease is not None
    ledger.fail(lease, ErrorClass.ENGINE_CRASH, "signal 6")
    assert [chunk.number for chunk in ledger.take_window(JOB, 7)] == [4, 6]


def test_a_split_keeps_results_that_are_there(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 16, 16)
    for attempt in range(3):
        lease = ledger.claim_next(JOB, "a")
        assert lease is not None
        ledger.record(lease, [ok(attempt * 2), ok(attempt * 2 + 1)])
        ledger.fail(lease, ErrorClass.ENGINE_CRASH, "crash")
        clock.advance(60)
    progress = ledger.progress(JOB)
    assert (progress.ok, progress.rows) == (6, 16)
    assert column(db, sa.select(sa.func.sum(chunks.c.ok))) == [6]
    assert column(db, sa.select(sa.func.count()).select_from(chunks).where(chunks.c.rows > 0)) == [8]


def test_lost_leases_are_found_and_their_attempts_closed(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, 2)
    ledger.claim(ChunkId(JOB, 0), "a")
    assert ledger.requeue_expired() == []
    clock.advance(LEASE_S + 1)
    assert ledger.requeue_expired() == [ChunkId(JOB, 0)]
    assert column(db, sa.select(attempts.c.outcome)) == ["lost"]


def test_a_window_publishes_a_few_chunks_at_a_time(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 10, 1)
    assert [chunk.number for chunk in ledger.take_window(JOB, 4)] == [0, 1, 2, 3]
    assert ledger.take_window(JOB, 4) == []
    lease = ledger.claim(ChunkId(JOB, 1), "a")
    assert lease is not None
    ledger.record(lease, [ok(1)])
    ledger.finish(lease)
    assert [chunk.number for chunk in ledger.take_window(JOB, 4)] == [4]


def test_a_lost_message_is_published_again(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, 1)
    ledger.take_window(JOB, 4)
    clock.advance(10)
    assert ledger.unpublish(JOB, older_than_s=5) == 2
    assert len(ledger.take_window(JOB, 4)) == 2


def test_cancelling_ends_a_job_and_its_workers_notice(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 4, 2)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    assert ledger.cancel(JOB)
    assert not ledger.cancel(JOB)
    assert ledger.renew(lease) is Standing.UNWANTED
    assert ledger.record(lease, [ok(0)]) == 0
    assert ledger.claim(ChunkId(JOB, 1), "a") is None


def test_a_paused_job_takes_what_still_runs_and_can_be_resumed(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 4, 2)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.pause(JOB)
    assert ledger.claim(ChunkId(JOB, 1), "a") is None
    assert ledger.record(lease, [ok(0)]) == 1
    ledger.release(lease)
    assert ledger.resume(JOB) is JobState.PAUSED
    assert ledger.claim(ChunkId(JOB, 1), "a") is not None


def test_a_finished_job_cannot_be_resumed(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 1, 1)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.record(lease, [ok(0)])
    ledger.finish(lease)
    with pytest.raises(JobError, match="nothing to resume"):
        ledger.resume(JOB)


def test_many_chunks_of_dead_workers_are_taken_back_some_at_a_time(
    ledger: Ledger, db: sa.Engine, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "MOST_AT_ONCE", 2)
    add_job(db, 5, 1)
    while ledger.claim_next(JOB, "a") is not None:
        pass
    clock.advance(LEASE_S + 1)
    taken_back = []
    while found := ledger.requeue_expired():
        assert len(found) <= 2
        taken_back += [chunk.number for chunk in found]
    assert taken_back == [0, 1, 2, 3, 4]


def test_a_job_waits_while_none_of_its_chunks_runs(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    """However long one is renewed: the job is not to move up for it."""
    add_job(db, 2, 1, submitted_at=clock() - 7)

    def waited_s() -> float:
        return float(ledger.open_jobs("queue")[0].waited_s)

    assert waited_s() == 7
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    for _ in range(60):
        clock.advance(10)
        ledger.renew(lease)
    assert waited_s() == 0
    ledger.release(lease)
    clock.advance(9)
    assert waited_s() == 9


def test_a_text_with_a_nul_is_stored(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 1, 1)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    answer = Ok(0, "a\x00b", FinishReason.STOP, Usage(1, 0, 1), Timing(1, 1, 1, 1))
    assert ledger.record(lease, [(answer, 16)]) == 1
    assert column(db, sa.select(results.c.text)) == ["a\N{REPLACEMENT CHARACTER}b"]


def test_a_chunk_that_failed_after_its_last_result_is_done(ledger: Ledger, db: sa.Engine) -> None:
    add_job(db, 2, 2)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    ledger.record(lease, [ok(0), ok(1)])
    ledger.fail(lease, ErrorClass.ENGINE_CRASH, "died at the very end")
    assert ledger.progress(JOB).state is JobState.COMPLETED


@pytest.mark.parametrize("how", ["finish", "release"])
def test_the_log_says_that_an_attempt_was_overtaken(
    ledger: Ledger, db: sa.Engine, clock: Any, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    add_job(db, 2, 2)
    late = ledger.claim(ChunkId(JOB, 0), "a")
    assert late is not None
    lose_lease(ledger, clock)
    assert not getattr(ledger, how)(late)
    assert "attempt 1 of a" in caplog.text
    assert "after its lease was lost" in caplog.text


def test_a_chunk_given_back_for_rows_that_are_left_is_no_news(
    ledger: Ledger, db: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    add_job(db, 2, 2)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    assert not ledger.finish(lease)
    assert ledger.release(lease)
    assert caplog.text == ""


def test_a_claim_whose_answer_was_lost_is_adopted(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 6, 2)
    known = ledger.claim_next(JOB, "a")
    lost = ledger.claim_next(JOB, "a")
    other = ledger.claim_next(JOB, "b")
    assert known
    assert lost
    assert other
    clock.advance(LEASE_S - 1)
    adopted = ledger.adopt("a", [known])
    assert adopted is not None
    assert (adopted.chunk, adopted.attempt, adopted.rows, adopted.model) == (lost.chunk, 1, 2, "echo")
    assert ledger.adopt("a", [known, adopted]) is None
    # It is its own from then on: the other two were not prolonged.
    clock.advance(2)
    assert set(ledger.requeue_expired()) == {known.chunk, other.chunk}
    assert ledger.renew(adopted) is Standing.HELD
    assert ledger.adopt("a", [adopted]) is None


def test_an_attempt_whose_end_is_said_twice_is_counted_once(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, 2)
    lease = ledger.claim_next(JOB, "a")
    assert lease
    last, counters = [ok(0), ok(1)], EngineCounters(steps=3, decode_tokens=4)
    assert ledger.finish(lease, counters, 4, last)
    # Its worker was not told that the commit went through.
    assert not ledger.finish(lease, counters, 4, last, maybe_stored=True)
    assert not ledger.release(lease, counters, 4, last)
    with db.connect() as connection:
        row = connection.execute(sa.select(attempts)).one()
    assert (row.outcome, row.steps, row.decode_tokens, row.wasted_tokens) == ("done", 3, 4, 0)


def test_an_overtaken_worker_ends_no_job(ledger: Ledger, db: sa.Engine, clock: Any) -> None:
    add_job(db, 2, 2)
    old = ledger.claim_next(JOB, "a")
    assert old
    lose_lease(ledger, clock)
    new = ledger.claim_next(JOB, "b")
    assert new
    assert not ledger.stop(JOB, "the model does not load", old)
    assert ledger.progress(JOB).state is JobState.RUNNING
    assert ledger.stop(JOB, "the model does not load", new)
    assert ledger.progress(JOB).state is JobState.FAILED


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of ``time.monotonic`` where leases are taken back; it stands still."""
    moment = [1000.0]
    monkeypatch.setattr(recovery, "time", SimpleNamespace(monotonic=lambda: moment[0]))
    return moment


@pytest.fixture
def overdue(ledger: Ledger, db: sa.Engine, clock: Any) -> Lease:
    """A lease that has run out."""
    add_job(db, 2, 2)
    lease = ledger.claim_next(JOB, "a")
    assert lease
    clock.advance(LEASE_S + 1)
    return lease


def test_nobody_is_lost_right_after_the_database_was_away(
    ledger: Ledger, overdue: Lease, clock: Any, here: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(recovery, "writing", _refuse)
        with pytest.raises(DatabaseError):
            ledger.requeue_expired()
    here[0] += 0.2 * LEASE_S
    assert ledger.requeue_expired() == []
    # It renews first, as it can again.
    assert ledger.renew(overdue) is Standing.HELD
    here[0] += 0.2 * LEASE_S
    assert ledger.requeue_expired() == []
    clock.advance(LEASE_S + 1)
    assert ledger.requeue_expired() == [overdue.chunk]


def test_a_database_that_hung_was_away_too(
    ledger: Ledger, overdue: Lease, here: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def hanging(db: sa.Engine) -> Iterator[Connection]:
        with writing(db) as connection:
            here[0] += LEASE_S
            yield connection

    with monkeypatch.context() as away:
        away.setattr(recovery, "writing", hanging)
        assert ledger.requeue_expired() == []
    assert ledger.requeue_expired() == []
    here[0] += 0.4 * LEASE_S
    assert ledger.requeue_expired() == [overdue.chunk]


def _refuse(db: sa.Engine) -> NoReturn:
    raise DatabaseError("the database is away")
