"""A run whose SQLite file another program holds: it waits, or gives up with one sentence. Its waits are cut short."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import promptmill
from promptmill.database import engine
from promptmill.errors import DatabaseError
from promptmill_workers.worker import local_worker

LINES = [{"prompt": f"one two three {row}"} for row in range(60)]
MODEL = "echo:token_s=0.05"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(tmp_path / "run"))
    # What half a minute is in earnest: each statement gives up after it.
    monkeypatch.setattr(engine, "SQLITE_BUSY_MS", 200)
    return tmp_path / "jobs.db"


@contextlib.contextmanager
def held_while_running(file: Path, seconds: float) -> Iterator[list[float]]:
    """Beside the block: take the write lock once a result is stored, and keep it. Yields the moments of both."""
    moments: list[float] = []

    def hold() -> None:
        deadline = time.monotonic() + 60
        while _results(file) == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.closing(sqlite3.connect(file, timeout=30, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            moments.append(time.monotonic())
            released.wait(seconds)
            db.execute("ROLLBACK")
            moments.append(time.monotonic())

    released = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield moments
    finally:
        released.set()
        thread.join()


def _results(file: Path) -> int:
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(file)) as db:
        return int(db.execute("SELECT count(*) FROM results").fetchone()[0])
    return 0


def test_a_run_outlasts_a_writer_that_holds_the_database(file: Path) -> None:
    with held_while_running(file, 3) as moments:
        job = promptmill.run(LINES, model=MODEL, database_url=f"sqlite:///{file}", slots=4)
        ended = time.monotonic()
    assert job.state.value == "completed"
    assert len(moments) == 2
    assert moments[1] < ended, "missed: the run ended before the lock was given back"
    assert [line["text"] for line in job.results()] == [line["prompt"] for line in LINES]
    assert all(each["ok"] is not False for each in job.report()["checks"])


def test_a_run_gives_up_with_one_sentence_and_goes_on_later(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_worker, "DATABASE_S", 1.0)
    url = f"sqlite:///{file}"
    with held_while_running(file, 60) as moments, pytest.raises(DatabaseError, match="database is locked"):
        promptmill.run(LINES, model=MODEL, database_url=url, slots=4)
    assert moments, "missed: nothing was stored before"
    monkeypatch.undo()
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(file.parent / "run"))
    job = promptmill.job("@last", url)
    assert job.state.value in ("running", "paused")
