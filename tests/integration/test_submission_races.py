"""Submissions at the same time: what each sees of the others. Over both databases."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from promptmill.core.settings import Settings
from promptmill.database.engine import connect, reading
from promptmill.database.tables import jobs
from promptmill.errors import JobExists, QueueFull
from promptmill.service import submission
from promptmill.service.job_options import JobOptions
from promptmill.service.prepare import prepare
from promptmill.service.submission import submit
from tests.conftest import wait_until


def submitted(database: sa.Engine, path: Path, queue_limit: int = 10_000_000, **options: Any) -> str:
    wanted = JobOptions(dataset=str(path), model="echo", **options)
    with prepare(wanted, Settings(max_queued_requests=queue_limit), "queue") as prepared:
        return submit(database, prepared)


def at_once(database: sa.Engine, path: Path, **options: Any) -> list[str]:
    """Four submissions of one file; what became of each."""

    def one(_: int) -> str:
        try:
            return submitted(database, path, **options)
        except (JobExists, QueueFull) as problem:
            return type(problem).__name__

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(one, range(4)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(3000)))
    return path


def test_of_four_that_ask_the_same_one_is_stored(database: sa.Engine, path: Path) -> None:
    became = at_once(database, path, if_exists="fail")
    assert became.count("JobExists") == 3
    with database.connect() as db:
        assert db.execute(sa.select(sa.func.count()).select_from(jobs)).scalar() == 1


def test_four_do_not_fill_the_queue_above_its_limit(database: sa.Engine, path: Path) -> None:
    became = at_once(database, path, queue_limit=7000)
    assert became.count("QueueFull") == 2


def test_a_table_that_is_vacuumed_keeps_no_submission_waiting(migrated_postgres_url: str, path: Path) -> None:
    database = connect(migrated_postgres_url)
    with ThreadPoolExecutor(1) as threads:
        with database.begin() as vacuum:
            vacuum.exec_driver_sql("LOCK TABLE requests, chunks IN SHARE UPDATE EXCLUSIVE MODE")
            stored = threads.submit(submitted, database, path)
            wait_until(stored.done, "the job is stored", 20)
        assert stored.result()
    database.dispose()


def test_a_job_is_stored_whatever_becomes_of_the_statistics(
    migrated_postgres_url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = connect(migrated_postgres_url)
    seen: list[Any] = []

    def refused(connection: sa.Connection, *tables: sa.Table) -> None:
        # Others see the job by now: its locks are gone.
        with reading(database) as db:
            seen.extend(db.execute(sa.select(jobs.c.id)).scalars())
        raise sa.exc.OperationalError("ANALYZE", {}, Exception("no room"))

    monkeypatch.setattr(submission, "refresh_statistics", refused)
    assert [submitted(database, path)] == seen
    database.dispose()
