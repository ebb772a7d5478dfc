"""The list of invariants itself: each is broken by hand in a copy of a good job's database, and must be found."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

import pytest
import sqlalchemy as sa

from tests.faults.arena import BY_SUBTRACTION, Arena, Violation, check

#: A row of the job that ends as an error.
BAD = {7: "FAIL"}


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    """With a job that has ended, as it should."""
    with Arena() as made:
        made.fresh()
        made.start_workers(2)
        made.submit(40, BAD)
        assert made.wait_for_end() == "completed"
        check(made, bad=BAD)
        made.stop_workers()
        yield made


def spoil(arena: Arena, *statements: str) -> None:
    """Go on with a copy of the database that these statements have changed."""
    url = sa.make_url(arena.environment["JOBS_DATABASE_URL"])
    copy = f"c{uuid.uuid4().hex[:10]}"
    arena.admin(f'CREATE DATABASE "{copy}" TEMPLATE "{url.database}"')
    arena.environment["JOBS_DATABASE_URL"] = url.set(database=copy).render_as_string(hide_password=False)
    engine = sa.create_engine(url.set(database=copy, drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


#: Attempts and answers of a worker that is lost, beside one that is not: the books as a whole close by subtraction.
ONE_LOST = (
    "INSERT INTO workers SELECT 'lost', host, 1, state, models, device_asked, device_got, engine, model, layers, "
    "layers_offloaded, slots, kv_cells, versions, clock_offset_s, model_load_s, host_restarts, started_at, "
    "heartbeat_at FROM workers LIMIT 1",
    "INSERT INTO attempts (job_id, number, attempt, worker_id, started_at, ended_at, outcome, decode_tokens, "
    "wasted_tokens) SELECT job_id, 0, 0, 'lost', started_at, ended_at, 'lost', 500, 0 FROM attempts WHERE number = 0",
)


@pytest.mark.parametrize(
    ("statements", "says"),
    [
        (["DELETE FROM results WHERE row = 3"], r"1 of 40 rows have no result: \[3\]"),
        (
            ["INSERT INTO requests (job_id, row, custom_id, input) SELECT id, 40, 'x', '{}' FROM jobs",
             "UPDATE results SET row = 40 WHERE row = 3"],
            r"rows that the dataset has not: \[40\]",
        ),
        (["DELETE FROM attempts WHERE number = 0"], "results without their attempt"),
        (["UPDATE results SET worker_id = 'another' WHERE row = 3"], "results without their attempt"),
        (["UPDATE results SET worker_id = NULL WHERE row = 3"], "answers of nobody"),
        (["UPDATE results SET error_class = 'stall' WHERE row = 7"], r"row 7 ended as \('stall', "),
        (["UPDATE results SET error_message = 'no' WHERE row = 7"], r"row 7 ended as \('internal', 'no'\)"),
        (["UPDATE results SET text = 'no' WHERE row = 3"], r"rows \[3\] have another answer"),
        (["UPDATE jobs SET state = 'failed'"], "the job is failed, expected completed"),
        (["UPDATE chunks SET ok = ok + 1 WHERE number = 0"], "counts of ok in chunks and results"),
        (["UPDATE chunks SET errors = errors - 1 WHERE errors > 0"], "counts of errors in chunks and results"),
        (["UPDATE chunks SET moved = moved + 1 WHERE number = 0"], "rows of chunks"),
        (["UPDATE chunks SET state = 'queued' WHERE number = 0"], "chunks not done"),
        (["UPDATE jobs SET state = 'running'"], "open jobs"),
        (["UPDATE attempts SET ended_at = NULL WHERE number = 0"], "attempts not ended"),
        (
            ["INSERT INTO attempts (job_id, number, attempt, worker_id, started_at, ended_at, outcome) "
             "SELECT job_id, number, 9, worker_id, started_at, ended_at, outcome FROM attempts WHERE number = 0"],
            "chunks done twice",
        ),
        (["UPDATE attempts SET decode_tokens = decode_tokens + 1 WHERE number = 0"], "check tokens"),
        ([*ONE_LOST, "UPDATE attempts SET decode_tokens = decode_tokens + 1 WHERE number = 0 AND attempt = 1"],
         "check tokens: worker "),
        (ONE_LOST, "the books of tokens are by subtraction, expected exact"),
        (["UPDATE attempts SET live_requests = 1"], "the books of tokens are not measured, expected exact"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(arena: Arena, statements: Sequence[str], says: str) -> None:
    good = dict(arena.environment)
    try:
        spoil(arena, *statements)
        with pytest.raises(Violation, match=says):
            check(arena, bad=BAD)
    finally:
        arena.environment = good


def test_a_lost_worker_alone_is_no_violation(arena: Arena) -> None:
    good = dict(arena.environment)
    try:
        spoil(arena, *ONE_LOST)
        check(arena, bad=BAD, lossy=True)
        assert arena.books == BY_SUBTRACTION
    finally:
        arena.environment = good
