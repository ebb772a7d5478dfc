"""Scores that the API keeps: in children, beside the batches, and fair to every key."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from promptmill.api.batches import scoring
from promptmill.api.batches.scoring import ScoreKeeper
from promptmill.core import child_processes
from promptmill.core.settings import Settings
from promptmill.database.engine import epoch, reading, writing
from promptmill.database.tables import api_keys, jobs, results, score_runs
from promptmill.queue.housekeeping import Housekeeping
from promptmill.store.redaction import FETCH_S
from promptmill.tasks.task_file import parse_task
from tests.conftest import wait_until
from tests.unit.test_reports import TASK, answer, store

SHA = parse_task(TASK, "ads").sha256


@pytest.fixture
def scores(database: sa.Engine) -> Iterator[ScoreKeeper]:
    made = ScoreKeeper(Settings(database_url=database.url.render_as_string(hide_password=False)), database)
    yield made
    made.close()


def ended(db: sa.Engine, job_id: str, key: str | None = None, ago_s: float = 1.0, **job: Any) -> None:
    """A job of a client's that has ended and came with a task."""
    store(db, [answer(row) for row in range(4)], job_id=job_id, expected={0: {"is_ad": True}},
          task_text=TASK, task_name="ads", task_sha256=SHA, mode="queue", **job)  # fmt: skip
    with writing(db) as connection:
        known = connection.execute(sa.select(api_keys.c.id).where(api_keys.c.id == key)).scalar()
        if key is not None and known is None:
            named = {"id": key, "name": key, "key_sha256": key, "scopes": "submit", "created_at": 1.0, "revoked": False}
            connection.execute(sa.insert(api_keys).values(**named))
        changed = {"api_key_id": key, "finished_at": epoch() - ago_s}
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**changed))


def test_a_keys_large_jobs_hold_up_nobody_elses_scores(
    scores: ScoreKeeper, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        ended(database, f"01LARGE{number}", "many")
    ended(database, "01SMALL", "few")
    called, may_end = [], threading.Event()

    def call(limits: child_processes.ChildLimits, function: Any, settings: Settings, job_id: str) -> None:
        called.append(job_id)
        if "LARGE" in job_id:
            assert may_end.wait(30)

    monkeypatch.setattr(f"{scoring.__name__}.child_processes.call", call)
    for _ in range(3):
        # None of these waits for a scorer.
        scores.step()
        wait_until(lambda: "01SMALL" in called, "the other key's job is scored", 10)
    assert [each for each in called if "LARGE" in each] == ["01LARGE0"]
    may_end.set()

    def all_were_scored() -> bool:
        scores.step()
        return len(called) == 4

    wait_until(all_were_scored, "each job is scored once", 10)


def test_texts_that_are_to_go_are_scored_in_a_child_first(
    scores: ScoreKeeper, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a client's task was evaluated in the keeper")

    monkeypatch.setattr("promptmill.scoring.runs.parse_task", never)
    ended(database, "01GOES", store="none", ago_s=FETCH_S + 60)
    Housekeeping(database, 14.0, scoring=False).step()
    assert stored_of(database, "01GOES") == "none"
    scores.step()
    wait_until(lambda: stored_of(database, "01GOES") == "removed", "its texts are gone", 30)
    with reading(database) as connection:
        assert connection.execute(sa.select(results.c.text)).scalars().all() == [None] * 4
        assert connection.execute(sa.select(score_runs.c.figures)).scalar() is not None


def test_texts_go_in_time_where_their_scores_take_too_long(
    scores: ScoreKeeper, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(database, "01SLOW", store="none", ago_s=FETCH_S + 60)
    monkeypatch.setattr(scoring, "for_report", lambda rows: child_processes.ChildLimits(0.0, 512))
    scores.step()
    wait_until(lambda: stored_of(database, "01SLOW") == "removed", "its texts are gone", 30)


def stored_of(db: sa.Engine, job_id: str) -> Any:
    with reading(db) as connection:
        return connection.execute(sa.select(jobs.c.store).where(jobs.c.id == job_id)).scalar()
