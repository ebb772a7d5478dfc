"""Removing jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from promptmill.database.engine import writing
from promptmill.database.tables import attempts, chunks, jobs, requests, results
from promptmill.errors import JobError
from promptmill.ledger import Ledger
from promptmill.store import retention
from promptmill.store.retention import collect, old_jobs, remove
from tests.unit.test_reports import JOB, START, answer, counters, store

DAY = 86_400.0


def rows_in(db: sa.Engine, table: sa.Table) -> int:
    with db.connect() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_a_removed_job_leaves_nothing_and_its_neighbours_stay(database: sa.Engine) -> None:
    store(database, [answer(0), answer(1)], tried=[counters()])
    store(database, [answer(0)], job_id="01OTHER")
    assert remove(database, JOB) == JOB
    assert [rows_in(database, each) for each in (jobs, requests, results, chunks, attempts)] == [1, 1, 1, 0, 0]


def test_a_job_that_has_not_ended_is_not_removed(database: sa.Engine) -> None:
    store(database, [answer(0)], rows=2, state="running")
    with pytest.raises(JobError, match="is running"):
        remove(database, JOB)
    assert rows_in(database, results) == 1


def test_a_job_that_is_being_removed_is_not_run_again(database: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    store(database, [answer(0), answer(1), answer(2)])
    refused = []

    @contextlib.contextmanager
    def interrupted(db: sa.Engine) -> Iterator[sa.Connection]:
        if rows_in(db, requests) < 3:
            with pytest.raises(JobError, match="nothing of it is run again") as problem:
                Ledger(db).retry(JOB)
            refused.append(problem)
        with writing(db) as connection:
            yield connection

    monkeypatch.setattr(retention, "BATCH_ROWS", 1)
    monkeypatch.setattr(retention, "writing", interrupted)
    remove(database, JOB)
    assert len(refused) == 3
    assert rows_in(database, jobs) == 0


def test_a_job_that_was_retried_after_it_was_listed_is_not_collected(
    database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(database, [answer(0)], rows=2, state="running")
    monkeypatch.setattr(retention, "old_jobs", lambda *_: [SimpleNamespace(id=JOB)])
    assert collect(database, "30d") == []
    assert [rows_in(database, each) for each in (jobs, results)] == [1, 1]


def test_only_jobs_that_ended_long_ago_are_collected(database: sa.Engine) -> None:
    store(database, [answer(0)], finished_at=START)
    store(database, [answer(0)], job_id="01NEW", finished_at=START + 29 * DAY)
    store(database, [answer(0)], job_id="01RUNS", state="running", rows=2)
    now = START + 31 * DAY
    assert [job.id for job in old_jobs(database, "30d", now)] == [JOB]
    assert collect(database, "30d", now) == [JOB]
    assert rows_in(database, jobs) == 2
